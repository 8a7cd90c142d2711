"""EVA and CorDA: what they write against their formulas, computed on inputs that hooks took from the whole model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import basiscli
from basiscli.model.layerwise import LayerwiseModel
from tests import init_models, kv_models
from tests.conftest import read_checkpoint, snapshot, stop_after
from tests.init_models import (
    Interrupts,
    Make,
    answer,
    check_pair,
    factors,
    load,
    off,
    quiet_peft,
    save,
    shards_of,
    with_peft,
)
from tests.kv_models import make_text, save_model, text_windows
from tests.plugins.reference_data_inits import Principal, check_rows, oriented, shared_out

pytestmark = quiet_peft
WINDOWS, LENGTH = 32, 24
ATTENTION = ("k_proj", "q_proj", "v_proj")


def uneven(layers: int = 3, **changes: Any) -> nn.Module:
    """Return a llama whose inputs vary in 10 directions in one layer, 16 in the next and all 32 in the third."""
    model = kv_models.llama(num_hidden_layers=layers, **changes)
    generator = torch.Generator().manual_seed(7)
    turns = [torch.linalg.qr(torch.randn(32, 32, generator=generator))[0] for _ in range(2)]
    model.model.embed_tokens.weight.data[:64] = torch.cat(turns)  # of the tokens below, no direction is preferred
    for place, layer in enumerate(model.model.layers):
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            scale = 0.9 + 0.2 * torch.rand(32, generator=generator)
            scale[(10, 16, 32)[place % 3] :] *= 0.02
            norm.weight.data = scale[torch.randperm(32, generator=generator)]
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.data *= 0.1
    return model  # type: ignore[no-any-return]


_SMALL: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64
}  # fmt: skip


def opt() -> nn.Module:
    """Return a model with linear layers before and after its stack, and a tied head after those."""
    return transformers.OPTForCausalLM(transformers.OPTConfig(**_SMALL, ffn_dim=48, word_embed_proj_dim=24))  # type: ignore[no-any-return]


def electra() -> nn.Module:
    config = transformers.ElectraConfig(**_SMALL, embedding_size=24, intermediate_size=48)
    return transformers.ElectraModel(config)  # type: ignore[no-any-return]


def neox() -> nn.Module:
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**_SMALL, intermediate_size=48))  # type: ignore[no-any-return]


MODELS: dict[str, Make] = {
    "uneven": uneven,
    "tied": lambda: kv_models.llama(tie_word_embeddings=True),
    "qwen2": kv_models.ARCHITECTURES["qwen2"],
    "gemma3": kv_models.ARCHITECTURES["gemma3"],
    "gpt2": init_models.gpt2,
    "bert": init_models.bert,
    "bert-classifier": init_models.bert_classifier,
    "electra": electra,
    "neox": neox,
    "opt": opt,
}
models = pytest.mark.parametrize("name", MODELS)


def write_tokens(
    file: Path,
    *,
    count: int = WINDOWS,
    length: int = LENGTH,
    seed: int = 3,
    padded: bool = False,
    answers: bool = False,
) -> Path:
    """Write random tokens; maybe some windows padded at the end, and maybe the first part of each without a label."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 60, (count, length), generator=generator)
    tensors = {"input_ids": ids}
    if padded:
        mask = torch.ones_like(ids)
        mask[1, length - 5 :] = 0
        mask[3, 4:] = 0
        tensors["attention_mask"] = mask
    if answers:
        tensors["labels"] = ids.clone()
        tensors["labels"][::2, : length // 3] = -100
    save_file(tensors, file)
    return file


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return write_tokens(tmp_path / "tokens.safetensors")


def run(method: str, model: Path, text: Path, out: Path, **options: Any) -> basiscli.InitResult:
    """Run a method that looks at data, on all of a file of tokens."""
    given = {"rank": 4, "tokens": 1 << 20, "length": LENGTH} | options
    return basiscli.init(model, method=method, calibration=text, output=out, **given)


def ranks_of(result: basiscli.InitResult) -> dict[str, int]:
    """Return the rank of every module as the report has it."""
    assert result.report.adapter is not None
    return {module: record.rank for module, record in result.report.adapter.modules.items()}


def linear_modules(model: nn.Module) -> list[str]:
    """Return what `all-linear` means."""
    heads = ("lm_head", "classifier", "embed_out")
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and not n.endswith(heads)]


# The formulas, densely and in float64 ---------------------------------------------------------------------------------


def inputs_of(folder: Path, file: Path) -> dict[str, Tensor]:
    """Return what each linear layer is called with, float64 [tokens that count, in], from one forward of the model."""
    model, given = load(folder).double(), load_file(file)
    ids = given["input_ids"]
    counted = given.get("attention_mask", torch.ones_like(ids)) == 1
    counted &= given.get("labels", ids) != -100
    rows: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if x.dim() == 2 and len(x) == given["input_ids"].numel():  # OPT's MLP gets all tokens in one dimension
                x = x.unflatten(0, given["input_ids"].shape)
            rows[name] = x[counted] if x.dim() == 3 else x  # a pooler sees one row a window

        return hook

    for name in linear_modules(model):
        model.get_submodule(name).register_forward_pre_hook(keep(name))
    with torch.no_grad():
        model(**{key: given[key] for key in ("input_ids", "attention_mask") if key in given})
    return rows


# EVA against its formula ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [{}, {"padded": True, "answers": True}], ids=["all", "some"])
@models
def test_a_spans_the_principal_directions_and_b_is_zero(tmp_path: Path, name: str, counts: dict[str, bool]) -> None:
    model = save(MODELS[name], tmp_path / "model")
    text = write_tokens(tmp_path / "tokens.safetensors", **counts)
    result = run("eva", model, text, tmp_path / "out")
    expected = {module: Principal(rows) for module, rows in inputs_of(model, text).items()}
    assert result.report.adapter is not None
    assert result.report.adapter.modules.keys() == expected.keys()
    ranks = shared_out({module: principal.ratios for module, principal in expected.items()}, 4, 2.0)
    assert ranks_of(result) == ranks
    assert len(set(ranks.values())) > 1
    stored = factors(result.adapter)
    assert stored.keys() == {module for module, rank in ranks.items() if rank}
    for module, (b, a) in stored.items():
        assert (len(a), b.shape[1]) == (ranks[module], ranks[module])
        assert not b.any()
        check_rows(a, expected[module])
        torch.testing.assert_close(a @ a.mT, torch.eye(len(a)), rtol=0, atol=1e-5)
    for module, record in result.report.adapter.modules.items():
        assert record.energy == pytest.approx(sum(expected[module].ratios[: ranks[module]]), abs=1e-6)
        assert (record.norm, record.error) == (None, None)


@pytest.mark.parametrize("rho", [1.0, 1.5, 2.0, 4.0])
def test_ranks_are_shared_out_by_explained_variance(tmp_path: Path, tokens: Path, rho: float) -> None:
    model = save(uneven, tmp_path / "model")
    result = run("eva", model, tokens, tmp_path / "out", parameters={"rho": rho})
    ratios = {module: Principal(rows).ratios for module, rows in inputs_of(model, tokens).items()}
    ranks = ranks_of(result)
    assert ranks == shared_out(ratios, 4, rho)
    assert sum(ranks.values()) == 4 * len(ranks)
    assert max(ranks.values()) == {1.0: 4, 1.5: 6, 2.0: 8, 4.0: 10}[rho]
    assert rho < 4 or min(ranks.values()) == 0
    numbers = result.report.numbers
    assert (numbers["rank_least"], numbers["rank_most"]) == (min(ranks.values()), max(ranks.values()))
    assert numbers["modules"] == sum(rank > 0 for rank in ranks.values())
    held = [sum(own[: ranks[module]]) for module, own in ratios.items()]
    assert numbers["energy"] == pytest.approx(sum(held) / len(held), abs=1e-6)
    assert numbers["energy_least"] == pytest.approx(min(held), abs=1e-6)


def test_more_ranks_than_directions_are_not_given_out(tmp_path: Path, tokens: Path) -> None:
    """round(rho · rank) is more than some matrices have columns."""
    model = save(uneven, tmp_path / "model")
    result = run("eva", model, tokens, tmp_path / "out", rank=16, parameters={"rho": 3})
    ranks, stored = ranks_of(result), factors(result.adapter)
    assert sum(ranks.values()) == 16 * len(ranks)
    for module, (_, a) in stored.items():
        assert len(a) == ranks[module] <= a.shape[1]
        torch.testing.assert_close(a @ a.mT, torch.eye(len(a)), rtol=0, atol=1e-5)


def test_whitened_inputs_have_variance_one(tmp_path: Path, tokens: Path) -> None:
    model = save(uneven, tmp_path / "model")
    result = run("eva", model, tokens, tmp_path / "out", parameters={"whiten": True})
    plain = run("eva", model, tokens, tmp_path / "plain")
    assert ranks_of(result) == ranks_of(plain)
    inputs, not_whitened = inputs_of(model, tokens), factors(plain.adapter)
    for module, (b, a) in factors(result.adapter).items():
        assert not b.any()
        seen = inputs[module] @ a.double().mT
        torch.testing.assert_close(seen.var(0, correction=0), torch.ones(len(a)).double(), rtol=1e-4, atol=0)
        check_rows(a / a.norm(dim=1, keepdim=True), Principal(inputs[module]))
        torch.testing.assert_close(a / a.norm(dim=1, keepdim=True), not_whitened[module][1], rtol=0, atol=1e-6)


def test_the_mean_can_stay_in(tmp_path: Path) -> None:
    """GPT-2's layer norms have biases here, so that the first direction is the mean's."""

    def shifted() -> nn.Module:
        model = init_models.gpt2()
        for key, parameter in model.named_parameters():
            if "ln_" in key and key.endswith("bias"):
                parameter.data += 3
        return model

    model, text = save(shifted, tmp_path / "model"), write_tokens(tmp_path / "tokens.safetensors", padded=True)
    inputs = inputs_of(model, text)
    found = {c: run("eva", model, text, tmp_path / f"{c}", parameters={"center": c}) for c in (True, False)}
    for center, result in found.items():
        principal = {module: Principal(rows, center=center) for module, rows in inputs.items()}
        assert ranks_of(result) == shared_out({m: p.ratios for m, p in principal.items()}, 4, 2.0)
        for module, (_, a) in factors(result.adapter).items():
            check_rows(a, principal[module])
    module = "transformer.h.0.mlp.c_fc"
    mean = inputs[module].mean(0) / inputs[module].mean(0).norm()
    along = {c: float((factors(result.adapter)[module][1][0].double() @ mean).abs()) for c, result in found.items()}
    assert along[False] > 0.99
    assert along[True] < 0.5


def test_modules_that_read_the_same_tensor_share_their_rows(tmp_path: Path, tokens: Path) -> None:
    model = save(uneven, tmp_path / "model")
    result = run("eva", model, tokens, tmp_path / "out")
    stored = factors(result.adapter)
    for layer in range(3):
        for names in ([f"self_attn.{leaf}" for leaf in ATTENTION], ["mlp.gate_proj", "mlp.up_proj"]):
            modules = [f"model.layers.{layer}.{name}" for name in names]
            given = [ranks_of(result)[module] for module in modules]
            assert max(given) - min(given) <= 1
            rows = [stored[module][1] for module, rank in zip(modules, given, strict=True) if rank]
            assert all(torch.equal(own[: min(given)], rows[0][: min(given)]) for own in rows)


def test_tokens_that_do_not_count_change_nothing(tmp_path: Path) -> None:
    """The end of some windows is padding, or has no label: what stands there is the same to the adapter."""
    model = save(uneven, tmp_path / "model")
    whole = load_file(write_tokens(tmp_path / "whole.safetensors"))["input_ids"]
    late = (torch.rand(whole.shape, generator=torch.Generator().manual_seed(1)) < 0.1).cumsum(1) > 0
    found = []
    for name in ("labels", "attention_mask"):
        for filling in (0, 17):
            ids = torch.where(late, filling, whole)
            mark = torch.where(late, -100, ids) if name == "labels" else (~late).long()
            text = tmp_path / f"{name}-{filling}.safetensors"
            save_file({"input_ids": ids, name: mark}, text)
            found.append(run("eva", model, text, tmp_path / f"{name}-{filling}"))
    for result in found[1:]:
        assert ranks_of(result) == ranks_of(found[0])
        for module, (_, a) in factors(result.adapter).items():
            torch.testing.assert_close(a, factors(found[0].adapter)[module][1], rtol=0, atol=1e-4)
    all_of_it = run("eva", model, tmp_path / "whole.safetensors", tmp_path / "whole")
    module = "model.layers.0.self_attn.q_proj"
    first, second = (factors(result.adapter)[module][1][:1] for result in (found[0], all_of_it))
    assert not torch.allclose(first, second, atol=1e-2)


def test_a_pooler_as_wide_as_a_window_is_long(tmp_path: Path) -> None:
    """Its inputs [windows, width] must not be taken for [windows, tokens]: the mask would pick numbers out of them."""
    model = save(init_models.bert, tmp_path / "model")
    length = load(model).pooler.dense.in_features
    text = write_tokens(tmp_path / "tokens.safetensors", padded=True, length=length)
    result = run("eva", model, text, tmp_path / "out", target_modules=r"pooler\.dense|.*query", length=length)
    assert ranks_of(result)["pooler.dense"] > 0
    check_rows(factors(result.adapter)["pooler.dense"][1], Principal(inputs_of(model, text)["pooler.dense"]))


# The adapter ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"alpha": 10.0}, {"alpha": 6.0, "rslora": True}], ids=str)
def test_the_configuration_scales_alpha_with_the_rank(tmp_path: Path, tokens: Path, options: dict[str, Any]) -> None:
    model = save(uneven, tmp_path / "model")
    result = run("eva", model, tokens, tmp_path / "out", **options)
    config = json.loads((result.adapter / "adapter_config.json").read_text())
    alpha, ranks = options.get("alpha", 4.0), ranks_of(result)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, alpha, options.get("rslora", False))
    assert config["rank_pattern"] == {module: rank for module, rank in ranks.items() if rank not in (0, 4)}
    assert config["alpha_pattern"] == {m: alpha * rank / 4 for m, rank in ranks.items() if rank not in (0, 4)}
    assert config["init_lora_weights"] is True
    assert config["peft_type"] == "LORA"
    plain = factors(run("eva", model, tokens, tmp_path / "plain").adapter)
    assert all(torch.equal(a, plain[module][1]) for module, (_, a) in factors(result.adapter).items())
    pair = with_peft(model, result.adapter)
    for module, rank in ((module, rank) for module, rank in ranks.items() if rank):
        layer = pair.base_model.model.get_submodule(module)
        assert (layer.r["default"], layer.lora_alpha["default"]) == (rank, pytest.approx(alpha * rank / 4))
        scaling = alpha / 4 * (rank**0.5 if options.get("rslora") else 1)
        assert layer.scaling["default"] == pytest.approx(scaling)


@pytest.mark.parametrize("layers", [3, 6])
def test_modules_of_rank_zero_stay_out_after_a_reload(tmp_path: Path, tokens: Path, layers: int) -> None:
    """PEFT shortens twenty and more targets to suffixes, which would bring them back with random factors."""
    model = save(uneven, tmp_path / "model", layers=layers)
    result = run("eva", model, tokens, tmp_path / "out", parameters={"rho": 4.0})
    ranks = ranks_of(result)
    kept = {module for module, rank in ranks.items() if rank}
    assert 0 < len(kept) < len(ranks) == 7 * layers
    config = json.loads((result.adapter / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == kept == set(factors(result.adapter))
    assert not (config["rank_pattern"].keys() | config["alpha_pattern"].keys()) - kept
    folder = result.adapter
    for turn in range(2):
        pair = with_peft(model, folder, is_trainable=True)
        trained = {n.rpartition(".lora_")[0] for n, parameter in pair.named_parameters() if parameter.requires_grad}
        assert {n.removeprefix("base_model.model.") for n in trained} == kept
        folder = tmp_path / f"saved-{turn}"
        pair.save_pretrained(folder)
        assert factors(folder).keys() == kept


@models
def test_the_base_with_its_adapter_is_the_base(tmp_path: Path, tokens: Path, name: str) -> None:
    model = save(MODELS[name], tmp_path / "model")
    before = snapshot(model)
    result = run("eva", model, tokens, tmp_path / "out", parameters={"whiten": True})
    assert result.residual is None
    assert sorted(entry.name for entry in result.path.iterdir()) == ["adapter", "basis_report.json"]
    assert snapshot(model) == before
    pair = with_peft(model, result.adapter)
    assert torch.equal(answer(pair), answer(load(model)))
    assert {n for n, _ in pair.named_parameters() if "lora_A" in n} == {
        f"base_model.model.{module}.lora_A.default.weight" for module in factors(result.adapter)
    }


def test_it_trains(tmp_path: Path, tokens: Path) -> None:
    model = save(uneven, tmp_path / "model")
    result = run("eva", model, tokens, tmp_path / "out")
    pair: Any = PeftModel.from_pretrained(load(model), result.adapter, is_trainable=True).train()
    stored = factors(result.adapter)
    for name, parameter in pair.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        if "lora_" in name:  # what was stored, and not a new start
            module = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
            assert torch.equal(parameter, stored[module]["lora_B" not in name])
    batch = load_file(tokens)["input_ids"][:4]
    optimiser = torch.optim.SGD([p for p in pair.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(3):
        loss = pair(input_ids=batch, labels=batch).loss
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [uneven, init_models.bert])
def test_narrow_weights_get_narrow_factors(tmp_path: Path, tokens: Path, make: Make, dtype: torch.dtype) -> None:
    """The inputs are those of the model as it is stored, run in float32."""
    model = save(make, tmp_path / "model", dtype=dtype)
    result = run("eva", model, tokens, tmp_path / "out")
    expected = {module: Principal(rows) for module, rows in inputs_of(model, tokens).items()}
    assert ranks_of(result) == shared_out({m: p.ratios for m, p in expected.items()}, 4, 2.0)
    for module, (b, a) in factors(result.adapter).items():
        assert (b.dtype, a.dtype) == (dtype, dtype)
        check_rows(a, expected[module], tolerance=torch.finfo(dtype).eps / 2)
    assert torch.equal(answer(with_peft(model, result.adapter)), answer(load(model)))


def test_another_dtype_for_the_factors(tmp_path: Path, tokens: Path) -> None:
    model = save(uneven, tmp_path / "model")
    wide = factors(run("eva", model, tokens, tmp_path / "wide").adapter)
    for module, (b, a) in factors(run("eva", model, tokens, tmp_path / "out", dtype="bf16").adapter).items():
        assert (b.dtype, a.dtype) == (torch.bfloat16, torch.bfloat16)
        assert torch.equal(a, wide[module][1].bfloat16())


def test_the_report_says_what_was_looked_at(tmp_path: Path) -> None:
    model = save(uneven, tmp_path / "model")
    text = write_tokens(tmp_path / "tokens.safetensors", padded=True)
    result = run("eva", model, text, tmp_path / "out", seed=5, exact=True, parameters={"rho": 1.5})
    report = result.report
    assert (report.command, report.seed, report.method.name) == ("init", 5, "eva")
    assert report.method.parameters == {"rho": 1.5, "whiten": False, "center": True}
    assert report.adapter is not None
    assert report.adapter.calibration is not None
    assert report.adapter.calibration.name == "tokens.safetensors"
    assert report.adapter.calibration.tokens == int(load_file(text)["attention_mask"].sum())
    assert len(report.adapter.calibration.sha256) == 64
    assert "error_most" not in report.numbers
    assert {tensor.action for tensor in report.tensors} == {"factor"}
    count = sum(b.numel() + a.numel() for b, a in factors(result.adapter).values())
    assert report.numbers["adapter_parameters"] == count
    size = (result.adapter / "adapter_model.safetensors").stat().st_size
    assert report.cost.written_bytes == size
    found = basiscli.verify(result.adapter)
    assert found.checked_digests
    assert found.weights_digest == report.weights_digest
    config = json.loads((result.adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model)


# Any way to run it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["eva", "corda"])
def test_same_bytes_however_it_is_run(tmp_path: Path, tokens: Path, method: str) -> None:
    model = save(uneven, tmp_path / "model")
    torch.manual_seed(0)
    sharded: Any = uneven()
    sharded.save_pretrained(tmp_path / "shards", max_shard_size="20kB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 3
    first = run(method, model, tokens, tmp_path / "first", workers=1)
    again = run(method, model, tokens, tmp_path / "again", workers=1)
    many = run(method, model, tokens, tmp_path / "many", workers=4)
    shards = run(method, tmp_path / "shards", tokens, tmp_path / "out", workers=2, shard_size="9kB")
    for other in (again, many):
        assert shards_of(other.path) == shards_of(first.path)
    assert len({result.report.weights_digest for result in (first, again, many, shards)}) == 1
    stored = [result.adapter / "adapter_model.safetensors" for result in (first, shards)]
    assert stored[0].read_bytes() == stored[1].read_bytes()


def test_how_many_windows_pass_at_a_time_is_rounding(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save(uneven, tmp_path / "model")
    whole = factors(run("eva", model, tokens, tmp_path / "whole").adapter)
    monkeypatch.setattr("basiscli.model.layerwise._BATCH_TOKENS", 3 * LENGTH)
    monkeypatch.setattr("basiscli.model.stored_moments._ROWS", 50)
    parts = factors(run("eva", model, tokens, tmp_path / "parts").adapter)
    assert parts.keys() == whole.keys()
    principal = {module: Principal(rows) for module, rows in inputs_of(model, tokens).items()}
    for module, (_, a) in parts.items():
        assert a.shape == whole[module][1].shape
        check_rows(a, principal[module])


@pytest.mark.parametrize(("wanted", "used"), [(1 << 20, 15), (100, 4), (24, 1), (47, 1), (360, 15), (359, 14)])
def test_text_is_used_as_far_as_it_goes(tmp_path: Path, wanted: int, used: int) -> None:
    """Windows are spread over the text: 15 of them there are."""
    model = save_model(tmp_path / "model", uneven())
    text = tmp_path / "text.txt"
    text.write_text(make_text(15 * LENGTH))  # and the end of the text, which begins a window that is not whole
    result = run("eva", model, text, tmp_path / "out", tokens=wanted, rank=2)
    assert result.report.adapter is not None and result.report.adapter.calibration is not None
    assert result.report.adapter.calibration.name == "text.txt"
    assert result.report.adapter.calibration.tokens == used * LENGTH
    ids = kv_models.byte_tokenizer()(text.read_text(), return_tensors="pt", verbose=False)["input_ids"]
    chosen = ids[0, : 15 * LENGTH].view(15, LENGTH)[[number * 15 // used for number in range(used)]]
    save_file({"input_ids": chosen.contiguous()}, tmp_path / "chosen.safetensors")
    same = run("eva", model, tmp_path / "chosen.safetensors", tmp_path / "same", rank=2)
    assert shards_of(same.path) == shards_of(result.path)


def test_windows_are_no_longer_than_asked_for(tmp_path: Path, tokens: Path) -> None:
    model = save(uneven, tmp_path / "model")
    short = run("eva", model, tokens, tmp_path / "out", length=20)
    save_file({"input_ids": load_file(tokens)["input_ids"][:, :20].contiguous()}, tmp_path / "cut.safetensors")
    cut = run("eva", model, tmp_path / "cut.safetensors", tmp_path / "cut")
    assert shards_of(short.path) == shards_of(cut.path)


# PEFT's own -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [2.0, 4.0])
def test_peft_shares_out_the_same_ranks_and_finds_the_same_subspaces(tmp_path: Path, rho: float) -> None:
    """Its PCA is randomised and truncated to rho · rank; one batch of everything makes it nearly exact.

    Who of q, k and v gets the last rank is chance there.
    """
    model = save(uneven, tmp_path / "model")
    text = write_tokens(tmp_path / "tokens.safetensors", padded=True, answers=True)
    result = run("eva", model, text, tmp_path / "out", parameters={"rho": rho})
    ours, ranks = factors(result.adapter), ranks_of(result)
    eva = EvaConfig(rho=rho)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=list(ranks), init_lora_weights="eva", eva_config=eva)
    theirs: Any = get_peft_model(load(model), config, low_cpu_mem_usage=True)
    initialize_lora_eva_weights(theirs, [load_file(text)], show_progress_bar=False)
    found: dict[str, Tensor] = {}
    for module in ranks:
        layer = theirs.base_model.model.get_submodule(module)
        if hasattr(layer, "lora_A"):
            found[module] = layer.lora_A["default"].weight.detach()
            assert layer.scaling["default"] == 1.0
    assert sum(map(len, found.values())) == sum(ranks.values()) == 4 * len(ranks)
    for group in groups(ranks):
        assert sorted(len(found.get(m, ())) for m in group) == sorted(ranks[m] for m in group), group
    inputs, cosines = inputs_of(model, text), []
    for module in found.keys() & ours.keys():
        a, theirs_a, principal = ours[module][1], found[module], Principal(inputs[module])
        least = min(len(a), len(theirs_a))
        moved = inputs[module] - inputs[module].mean(0)
        held = [float((moved @ rows[:least].double().mT).square().sum()) for rows in (a, theirs_a)]
        assert held[0] >= held[1] * (1 - 1e-6)
        if principal.squares[least - 1] > 1.1 * principal.squares[least]:  # a subspace that its neighbours do not blur
            cosines.append(torch.linalg.svdvals(theirs_a[:least] @ a[:least].mT).min())
    assert len(cosines) > len(ranks) / 4
    assert float(torch.stack(cosines).min()) > 0.995


def groups(modules: Mapping[str, int]) -> list[list[str]]:
    """Return modules by the tensor they read."""
    found: dict[str, list[str]] = {}
    for module in modules:
        layer, _, leaf = module.rpartition(".")
        shared = {"gate_proj": "mlp", "up_proj": "mlp", **dict.fromkeys(ATTENTION, "attention")}
        found.setdefault(f"{layer}.{shared.get(leaf, leaf)}", []).append(module)
    return list(found.values())


# CorDA ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["instruction", "knowledge"])
@pytest.mark.parametrize("damping", [0.01, 0.5])
@pytest.mark.parametrize("name", ["uneven", "gpt2", "bert"])
def test_corda_is_the_svd_of_the_weight_as_its_inputs_see_it(
    tmp_path: Path, name: str, mode: str, damping: float
) -> None:
    model = save(MODELS[name], tmp_path / "model")
    text = write_tokens(tmp_path / "tokens.safetensors", padded=True, answers=True)
    parameters = {"damping": damping, "mode": mode}
    result = run("corda", model, text, tmp_path / "out", alpha=10, parameters=parameters)
    assert result.residual is not None
    weights, rest, inputs = read_checkpoint(model), read_checkpoint(result.residual), inputs_of(model, text)
    transposed = name == "gpt2"
    stored = factors(result.adapter)
    assert stored.keys() == inputs.keys()
    for module, (b, a) in stored.items():
        weight = weights[f"{module}.weight"].double()
        weight, left = (x.mT if transposed else x for x in (weight, rest[f"{module}.weight"].double()))
        b64, a64 = oriented(weight, inputs[module], 4, mode, damping)
        product = 2.5 * b.double() @ a.double()
        assert off(product, b64 @ a64) < 1e-4, module
        assert (left + product - weight).norm() < 1e-6 * weight.norm()
        # The split between the two: the scaling is taken from both alike.
        for found, expected in ((b.norm(dim=0), b64.norm(dim=0)), (a.norm(dim=1), a64.norm(dim=1))):
            torch.testing.assert_close(2.5**0.5 * found.double(), expected, rtol=1e-3, atol=0)
    check_pair(model, result, apart=1e-5)


def test_instruction_mode_leaves_the_least_of_what_the_text_uses(tmp_path: Path, tokens: Path) -> None:
    """Of all matrices of the rank; pissa's loses more of it, and the knowledge mode hardly touches it."""
    model = save(uneven, tmp_path / "model")
    weights, inputs = read_checkpoint(model), inputs_of(model, tokens)
    results = {
        "instruction": run("corda", model, tokens, tmp_path / "i", exact=True),
        "knowledge": run("corda", model, tokens, tmp_path / "k", exact=True, parameters={"mode": "knowledge"}),
        "pissa": basiscli.init(model, rank=4, output=tmp_path / "p", exact=True),
    }
    for module, rows in inputs.items():
        weight = weights[f"{module}.weight"].double()
        taken = {}
        for key, result in results.items():
            b, a = factors(result.adapter)[module]
            taken[key] = float((rows @ (b.double() @ a.double()).mT).norm() / (rows @ weight.mT).norm())
        assert taken["knowledge"] < min(taken["instruction"], taken["pissa"])
    energy = {key: result.report.numbers["energy"] for key, result in results.items()}
    assert energy["pissa"] > energy["instruction"]


@pytest.mark.parametrize("mode", ["instruction", "knowledge"])
@pytest.mark.parametrize("make", [uneven, init_models.gpt2])
def test_the_whole_rank_is_the_whole_weight(tmp_path: Path, tokens: Path, make: Make, mode: str) -> None:
    square: Any = {"num_key_value_heads": 4} if make is uneven else {}
    model = save(make, tmp_path / "model", **square)
    result = run("corda", model, tokens, tmp_path / "out", rank=32, parameters={"mode": mode})
    weights = read_checkpoint(model)
    for module, (b, a) in factors(result.adapter).items():
        weight = weights[f"{module}.weight"]
        assert off(b @ a, weight.mT if make is init_models.gpt2 else weight) < 1e-4
    assert result.report.numbers["energy_least"] > 1 - 1e-7


def test_the_scale_of_the_activations_does_not_matter(tmp_path: Path, tokens: Path) -> None:
    """Norms eight times as large make inputs eight times as large, and the split between B and A stays."""

    def louder() -> nn.Module:
        model = uneven()
        for key, parameter in model.named_parameters():
            if "layernorm" in key:
                parameter.data *= 8
        return model

    first = "model.layers.0.self_attn."  # further on the model is another one
    stored = []
    for make in (uneven, louder):
        model = save(make, tmp_path / make.__name__)
        options = {"target_modules": [f"{first}{leaf}" for leaf in ATTENTION], "damping": 0.1}
        damping = options.pop("damping")
        result = run("corda", model, tokens, tmp_path / f"out-{make.__name__}", parameters={"damping": damping},
                     **options)  # fmt: skip
        stored.append(factors(result.adapter))
    for module, (b, a) in stored[0].items():
        assert off(stored[1][module][0], b) < 1e-4
        assert off(stored[1][module][1], a) < 1e-4


def counting(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return a list that gets (layer, batch) of every batch that passes a layer."""
    seen: list[tuple[int, int]] = []
    through = LayerwiseModel.forward_layer

    def counted(self: LayerwiseModel, place: int, number: int, hidden: Tensor) -> Any:
        seen.append((place, number))
        return through(self, place, number, hidden)

    monkeypatch.setattr(LayerwiseModel, "forward_layer", counted)
    return seen


@pytest.mark.parametrize("method", ["eva", "corda"])
def test_the_text_passes_each_layer_once(
    tmp_path: Path, tokens: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save(uneven, tmp_path / "model")
    monkeypatch.setattr("basiscli.model.layerwise._BATCH_TOKENS", 8 * LENGTH)
    seen = counting(monkeypatch)
    run(method, model, tokens, tmp_path / "out")
    assert sorted(seen) == [(layer, batch) for layer in range(3) for batch in range(WINDOWS // 8)]


def test_the_text_is_not_run_again_for_weights_that_are_done(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save(uneven, tmp_path / "model")
    with pytest.raises(KeyboardInterrupt):  # three layers, and two of the copies after them
        run("corda", model, tokens, tmp_path / "out", workers=1, progress=Interrupts(5))
    seen = counting(monkeypatch)
    result = run("corda", model, tokens, tmp_path / "out")
    assert result.report.cost.resumed_steps == 23
    assert seen == []


# Interruptions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "after", "resumed"),
    [("eva", 1, 0), ("eva", 5, 0), ("eva", 9, 0), ("corda", 1, 0), ("corda", 5, 7), ("corda", 8, 14), ("corda", 11, 23),
     ("corda", 15, 27)],
)  # fmt: skip
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    tmp_path: Path, tokens: Path, method: str, after: int, resumed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine batches pass the layers, each with seven targets; then CorDA copies what it leaves as it is."""
    monkeypatch.setattr("basiscli.model.layerwise._BATCH_TOKENS", 12 * LENGTH)
    model = save(uneven, tmp_path / "model")
    whole = run(method, model, tokens, tmp_path / "whole", workers=1)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        run(method, model, tokens, tmp_path / "out", workers=1, progress=Interrupts(after))
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").is_dir()
    again = run(method, model, tokens, tmp_path / "out", workers=2)
    assert shards_of(again.path) == shards_of(whole.path)
    assert again.report.cost.resumed_steps == resumed
    assert not (tmp_path / "out.partial").exists()
    assert snapshot(model) == before
    assert again.report.numbers == whole.report.numbers
    assert again.report.weights_digest == whole.report.weights_digest
    assert again.report.adapter == whole.report.adapter


@pytest.mark.parametrize("method", ["eva", "corda"])
def test_a_run_that_died_while_it_wrote_goes_on(
    tmp_path: Path, tokens: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the journal has some factors, and the files of the rest are there and empty."""
    from basiscli.commands.init.run import InitRun

    model = save(uneven, tmp_path / "model")
    whole = run(method, model, tokens, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, InitRun, "write_adapter", 5)
        with pytest.raises(KeyboardInterrupt):
            run(method, model, tokens, tmp_path / "out", workers=1)
    again = run(method, model, tokens, tmp_path / "out")
    assert shards_of(again.path) == shards_of(whole.path)
    assert again.report.adapter == whole.report.adapter
    assert basiscli.verify(again.adapter).checked_digests


def test_what_is_in_the_journal_is_not_decomposed_again(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save(uneven, tmp_path / "model")
    with pytest.raises(KeyboardInterrupt):
        run("corda", model, tokens, tmp_path / "out", workers=1, progress=Interrupts(2))
    from basiscli.commands.init.from_weights import WeightsRun

    decompose, done = WeightsRun.decompose, []

    def counted(self: WeightsRun, name: str, *inputs: Any) -> dict[str, Any]:
        done.append(name)
        return decompose(self, name, *inputs)

    monkeypatch.setattr(WeightsRun, "decompose", counted)
    result = run("corda", model, tokens, tmp_path / "out", workers=1)
    assert result.report.cost.resumed_steps == 7
    assert len(done) == 14
    assert not any(".layers.0." in name for name in done)


@pytest.mark.parametrize("place", ["file", "folder"])
@pytest.mark.parametrize("method", ["eva", "corda"])
def test_another_text_starts_anew(tmp_path: Path, method: str, place: str) -> None:
    """Half of the factors from one text and half from another would be neither's."""
    model = save_model(tmp_path / "model", uneven())
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text(make_text(600, seed=0))
    text = folder if place == "folder" else folder / "a.txt"
    with pytest.raises(KeyboardInterrupt):
        run(method, model, text, tmp_path / "out", workers=1, progress=Interrupts(2))
    (folder / "a.txt").write_text(make_text(600, seed=1))
    result = run(method, model, text, tmp_path / "out")
    assert result.report.cost.resumed_steps == 0
    fresh = run(method, model, text, tmp_path / "fresh")
    assert shards_of(result.path) == shards_of(fresh.path)


def test_other_parameters_start_anew(tmp_path: Path, tokens: Path) -> None:
    model = save(uneven, tmp_path / "model")
    for options in ({"parameters": {"damping": 0.1}}, {"tokens": 320}, {"length": 16}):
        with pytest.raises(KeyboardInterrupt):
            run("corda", model, tokens, tmp_path / "out", workers=1, progress=Interrupts(2))
        result = run("corda", model, tokens, tmp_path / "out", **options)
        assert result.report.cost.resumed_steps == 0
        fresh = run("corda", model, tokens, tmp_path / "fresh", **options)
        assert shards_of(result.path) == shards_of(fresh.path)
        for name in ("out", "fresh"):
            (tmp_path / name).rename(tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}")


# Which modules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["eva", "corda"])
@pytest.mark.parametrize(
    "targets", [["lm_head"], ["q_proj", "lm_head"], ["model.layers.2.mlp.down_proj"], r".*layers\.1\..*"], ids=str
)
def test_some_modules(tmp_path: Path, tokens: Path, method: str, targets: Any) -> None:
    model = save(uneven, tmp_path / "model")
    if targets == ["lm_head"]:
        targets = ["lm_head", "model.layers.0.mlp.up_proj"]  # a target in a list of layers says which list runs
    result = run(method, model, tokens, tmp_path / "out", target_modules=targets)
    inputs = inputs_of(model, tokens) | head_inputs(model, tokens)
    stored = factors(result.adapter)
    for module, (_, a) in stored.items():
        if method == "eva":
            check_rows(a, Principal(inputs[module]))
    if isinstance(targets, list):
        assert ranks_of(result).keys() == {m for m in inputs if m.endswith(tuple(targets))}
    if method == "corda":
        check_pair(model, result, apart=1e-5)


def head_inputs(folder: Path, file: Path) -> dict[str, Tensor]:
    model = load(folder).double()
    with torch.no_grad():
        return {"lm_head": model.model(load_file(file)["input_ids"]).last_hidden_state.flatten(0, 1)}


def test_gpt2_as_it_is_published_lacks_a_prefix(tmp_path: Path, tokens: Path) -> None:
    """Its files say `h.0…`, and the model that is loaded from them `transformer.h.0…`."""
    model = save(init_models.gpt2, tmp_path / "model")
    whole = run("eva", model, tokens, tmp_path / "whole")
    file = model / "model.safetensors"
    save_file({n.removeprefix("transformer."): t for n, t in load_file(file).items()}, file, {"format": "pt"})
    published = run("eva", model, tokens, tmp_path / "out")
    assert shards_of(published.path) == shards_of(whole.path)
    assert torch.equal(answer(with_peft(model, published.adapter)), answer(load(model)))


def test_a_weights_file_is_a_model(tmp_path: Path, tokens: Path) -> None:
    model = save(uneven, tmp_path / "model")
    one = run("eva", model / "model.safetensors", tokens, tmp_path / "file")
    assert shards_of(one.path) == shards_of(run("eva", model, tokens, tmp_path / "folder").path)


def test_the_built_in_text_serves_where_none_is_given(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", uneven())
    result = basiscli.init(model, method="eva", rank=4, tokens=512, length=32, output=tmp_path / "out")
    assert result.report.adapter is not None and result.report.adapter.calibration is not None
    assert (result.report.adapter.calibration.name, result.report.adapter.calibration.tokens) == ("built-in mix", 512)
    assert torch.equal(answer(with_peft(model, result.adapter)), answer(load(model)))


def test_text_windows_are_what_the_tokenizer_makes_of_the_text(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", uneven())
    (tmp_path / "text.txt").write_text(make_text(12 * LENGTH))
    save_file({"input_ids": text_windows(12, LENGTH).ids.contiguous()}, tmp_path / "tokens.safetensors")
    found = [
        run("eva", model, tmp_path / name, tmp_path / f"out-{name}") for name in ("text.txt", "tokens.safetensors")
    ]
    assert shards_of(found[0].path) == shards_of(found[1].path)
