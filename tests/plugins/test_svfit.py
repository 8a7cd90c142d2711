"""svfit: the weight's largest singular values, trained alone, in the form that stock PEFT loads."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import Result

import basiscli
from tests.conftest import read_checkpoint, snapshot, write_checkpoint
from tests.init_models import (
    IDS,
    Interrupts,
    Make,
    answer,
    bert,
    bert_classifier,
    gpt2,
    llama,
    load,
    mixtral,
    off,
    quiet_peft,
    qwen2,
    save,
    shards_of,
    with_peft,
)

pytestmark = quiet_peft
Basis = Callable[..., Result]
DTYPES = pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-6), (torch.float16, 3e-4), (torch.bfloat16, 1.8e-3)], ids=str
)


def tied() -> nn.Module:
    return llama(tie_word_embeddings=True)


def deep() -> nn.Module:
    """More than twenty targets: PEFT shortens their names then."""
    return llama(num_hidden_layers=4)


def svfit(model: Path, out: Path, **options: Any) -> basiscli.InitResult:
    return basiscli.init(model, method="svfit", **{"rank": 4} | options, output=out)


def stored_parts(adapter: Path, modules: list[str]) -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return (B, v, A, P) by module: v by the module's number."""
    stored = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for place, module in enumerate(modules):
        at = f"base_model.model.{module}.tinylora_"
        found[module] = stored[f"{at}B"], stored[f"base_model.tinylora_v.{place}"], stored[f"{at}A"], stored[f"{at}P"]
    assert len(stored) == 4 * len(modules)
    return found


def modules_of(model: nn.Module) -> list[str]:
    """Return the linear layers but the output layer, in the order of the loaded model."""
    from transformers.pytorch_utils import Conv1D

    heads = ("lm_head", "classifier")
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and not n.endswith(heads)]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def train(start: basiscli.InitResult, out: Path, steps: int = 5) -> Tensor:
    """Train as a user would, save, and return what the trained model answers."""
    assert start.residual is not None
    pair = with_peft(start.residual, start.adapter, is_trainable=True).train()
    optimiser = torch.optim.AdamW(trainable(pair).values(), lr=0.05)
    for _ in range(steps):
        pair(input_ids=IDS).logits.float().logsumexp(-1).sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    pair.eval().save_pretrained(out)
    return answer(pair)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `model`, `start` from it, what was `trained` from that, and `answer.pt`."""
    home = tmp_path_factory.mktemp("svfit")
    save(llama, home / "model")
    start = svfit(home / "model", home / "start")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.save(train(start, home / "trained"), home / "answer.pt")
    return home


# What is written ------------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("make", [llama, gpt2])
def test_residual_and_adapter_are_the_weight(tmp_path: Path, make: Make, dtype: torch.dtype, bound: float) -> None:
    """As stored: to one rounding of the residual, which takes up the rounding of the parts."""
    model = save(make, tmp_path / "model", dtype=dtype)
    result = svfit(model, tmp_path / "out")
    assert result.residual is not None
    assert result.report.adapter is not None
    weights, rest, loaded = read_checkpoint(model), read_checkpoint(result.residual), load(model)
    parts = stored_parts(result.adapter, modules_of(loaded))
    for module, (b, v, a, p) in parts.items():
        turned = make is gpt2
        before, left = (t[f"{module}.weight"].mT if turned else t[f"{module}.weight"] for t in (weights, rest))
        assert {b.dtype, v.dtype, a.dtype, left.dtype} == {dtype}
        assert (b.shape, v.shape, a.shape) == ((before.shape[0], 4), (4,), (4, before.shape[1]))
        assert torch.equal(torch.einsum("i,ijk->jk", v, p.to(v.dtype)), v.diag())
        update = (b.double() * v.double()) @ a.double()
        total = left.double() + update
        assert off(total, before) <= bound
        assert bool(((total - before).abs() <= 0.51 * torch.finfo(dtype).eps * left.double().abs() + 5e-6).all())
        record = result.report.adapter.modules[module]
        assert record.rank == 4
        assert record.error == pytest.approx(off(total, before), rel=0.05, abs=1e-7)
        assert record.energy == pytest.approx(1 - off(update, before) ** 2, abs=1e-4)
    others = rest.keys() - {f"{module}.weight" for module in parts}
    assert rest.keys() == weights.keys()
    assert all(torch.equal(rest[name], weights[name]) for name in others)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("rank", [1, 5, 16])
def test_it_is_the_formula_in_float64(tmp_path: Path, rank: int, exact: bool) -> None:
    model = save(llama, tmp_path / "model")
    result = svfit(model, tmp_path / "out", rank=rank, exact=exact)
    weights = read_checkpoint(model)
    for module, (b, v, a, _) in stored_parts(result.adapter, modules_of(load(model))).items():
        u, s, vh = torch.linalg.svd(weights[f"{module}.weight"].double(), full_matrices=False)
        torch.testing.assert_close(v.double(), s[:rank], rtol=1e-5, atol=1e-6)
        identity = torch.eye(rank)
        torch.testing.assert_close(b.mT @ b, identity, rtol=0, atol=1e-4)
        torch.testing.assert_close(a @ a.mT, identity, rtol=0, atol=1e-4)
        assert off((b * v) @ a, (u[:, :rank] * s[:rank]) @ vh[:rank]) < (1e-4 if exact else 1e-2)


def test_the_report_says_what_is_trained(home: Path) -> None:
    modules = modules_of(load(home / "model"))
    for folder in ("start", "start/adapter", "start/residual"):
        report = json.loads((home / folder / "basis_report.json").read_text())
        assert report["method"]["source"] == "Sun et al., 'SVFit', arXiv 2409.05926"
        assert (report["adapter"]["trains"], report["adapter"]["rank"], report["adapter"]["rslora"]) == (
            "values", 4, False
        )  # fmt: skip
        assert list(report["adapter"]["modules"]) == modules
        assert report["numbers"]["adapter_parameters"] == 4 * len(modules)
    kinds = {t["kind"] for t in json.loads((home / "start/adapter/basis_report.json").read_text())["tensors"]}
    assert kinds == {"tinylora"}
    config = json.loads((home / "start/adapter/adapter_config.json").read_text())
    assert config == {
        "peft_type": "TINYLORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(home / "start" / "residual"),
        "target_modules": modules, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "modules_to_save": None, "r": 4, "u": 4, "weight_tying": 0.0, "save_projection": True, "tinylora_dropout": 0.0,
        "init_weights": True,
    }  # fmt: skip


def test_another_dtype_for_everything(tmp_path: Path) -> None:
    result = svfit(save(llama, tmp_path / "model"), tmp_path / "out", dtype="bf16")
    dtypes = {name.rpartition("_")[2]: t.dtype for name, t in read_checkpoint(result.adapter).items()}
    assert {dtypes["A"], dtypes["B"], dtypes["v.0"]} == {torch.bfloat16}
    assert dtypes["P"] is torch.uint8


def test_it_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "methods" / "svfit.md").read_text()
    assert all(word in page for word in ("2409.05926", "r³", "PEFT (0.19", "full SVD", "--initial"))


# With stock PEFT ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llama, tied, deep, qwen2, gpt2, bert, bert_classifier])
def test_stock_peft_loads_the_model_and_trains_the_values_alone(tmp_path: Path, make: Make) -> None:
    model = save(make, tmp_path / "model")
    result = svfit(model, tmp_path / "out")
    assert result.residual is not None
    expected, modules = answer(load(model)), modules_of(load(model))
    pair = with_peft(result.residual, result.adapter, is_trainable=True)
    assert off(answer(pair), expected) < 1e-5
    with pair.disable_adapter():
        assert off(answer(pair), expected) > 1e-3
    found = trainable(pair)
    assert sum(parameter.numel() for parameter in found.values()) == 4 * len(modules)
    assert all(".tinylora_v." in name for name in found)
    assert not trainable(with_peft(result.residual, result.adapter))
    # Trained by its number, a vector belongs to the module whose singular values it holds.
    for module, (_, v, _, _) in stored_parts(result.adapter, modules).items():
        layer = pair.get_submodule(f"base_model.model.{module}")
        assert torch.equal(layer.tinylora_v["default"][layer._tinylora_v_key["default"]], v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_narrow_weights_load_with_peft(tmp_path: Path, make: Make, dtype: torch.dtype) -> None:
    model = save(make, tmp_path / "model", dtype=dtype)
    result = svfit(model, tmp_path / "out")
    assert result.residual is not None
    pair = with_peft(result.residual, result.adapter, is_trainable=True)
    assert off(answer(pair), answer(load(model))) < 2 * torch.finfo(dtype).eps
    assert {parameter.dtype for parameter in trainable(pair).values()} == {torch.float32}


@pytest.mark.parametrize("published", [True, False], ids=["h.0", "transformer.h.0"])
def test_gpt2_as_it_is_published_lacks_a_prefix(tmp_path: Path, published: bool) -> None:
    model = save(gpt2, tmp_path / "model")
    if published:
        file = model / "model.safetensors"
        save_file({n.removeprefix("transformer."): t for n, t in load_file(file).items()}, file, {"format": "pt"})
    result = svfit(model, tmp_path / "out")
    assert result.residual is not None
    assert off(answer(with_peft(result.residual, result.adapter)), answer(load(model))) < 1e-5
    assert read_checkpoint(result.residual).keys() == read_checkpoint(model).keys()


@pytest.mark.parametrize(
    "wanted", [["v_proj", "q_proj"], ["down_proj"], r"model\.layers\.1\..*_proj", ["lm_head", "k_proj"]], ids=str
)
def test_numbers_count_the_targets_alone(tmp_path: Path, wanted: str | list[str]) -> None:
    model = save(llama, tmp_path / "model")
    result = svfit(model, tmp_path / "out", target_modules=wanted)
    assert result.residual is not None
    assert off(answer(with_peft(result.residual, result.adapter)), answer(load(model))) < 1e-5


def test_the_order_is_the_model_s_and_not_that_of_names(home: Path) -> None:
    report = basiscli.reports.schema.read_report(home / "start")
    assert report is not None
    assert report.adapter is not None
    modules = list(report.adapter.modules)
    assert modules != sorted(modules)
    assert modules[:2] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]


def test_training_changes_the_values_and_nothing_else(home: Path) -> None:
    before, after = (load_file(home / name / "adapter_model.safetensors") for name in ("start/adapter", "trained"))
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor.double(), before[name].double()) == (".tinylora_v." not in name)


def test_what_was_saved_loads_again(home: Path) -> None:
    again = with_peft(home / "start" / "residual", home / "trained")
    assert torch.equal(answer(again), torch.load(home / "answer.pt"))


# The run --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llama, gpt2])
def test_same_bytes_for_any_number_of_workers_and_any_shards(tmp_path: Path, make: Make) -> None:
    model = save(make, tmp_path / "model")
    runs = [
        svfit(model, tmp_path / str(place), workers=workers, shard_size=size)
        for place, (workers, size) in enumerate([(1, "5GB"), (4, "5GB"), (2, "9kB")])
    ]
    assert len({run.report.weights_digest for run in runs}) == 1
    assert shards_of(runs[0].path) == shards_of(runs[1].path)
    assert shards_of(runs[0].adapter) == shards_of(runs[2].adapter)
    assert len(list((tmp_path / "2" / "residual").glob("model-*.safetensors"))) > 3


def test_an_interrupted_run_goes_on_to_the_same_bytes(home: Path, tmp_path: Path) -> None:
    before = snapshot(home / "model")
    for after in (2, 9):
        with pytest.raises(KeyboardInterrupt):
            svfit(home / "model", tmp_path / "out", workers=1, progress=Interrupts(after))
    again = svfit(home / "model", tmp_path / "out", workers=1)
    assert again.report.cost.resumed_steps == 11
    assert shards_of(tmp_path / "out") == shards_of(home / "start")
    assert snapshot(home / "model") == before


def test_the_command_line(home: Path, tmp_path: Path, basis: Basis) -> None:
    words = ["init", home / "model", "-m", "svfit", "-r", "4", "-o", tmp_path / "out"]
    planned = basis(*words, "--dry-run")
    assert "14 modules of rank 4, singular values trained" in planned.stdout
    assert not (tmp_path / "out").exists()
    done = basis(*words)
    assert done.exit_code == 0, done.stderr
    assert "14 modules of rank 4, 56 parameters: " in done.stderr
    assert shards_of(tmp_path / "out") == shards_of(home / "start")
    seen = basis("inspect", tmp_path / "out" / "adapter")
    assert "4 singular values a module" in seen.stdout
    assert "tinylora" in seen.stdout
    assert basis("verify", tmp_path / "out" / "adapter").exit_code == 0
    file = tmp_path / "out" / "adapter" / "adapter_model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    refused = basis("verify", tmp_path / "out" / "adapter")
    assert refused.exit_code == 3
    assert "digest differs" in refused.stderr


# Back to plain LoRA ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llama, tied, deep, gpt2])
def test_what_was_trained_is_plain_lora_of_the_original(tmp_path: Path, make: Make) -> None:
    model = save(make, tmp_path / "model")
    start = svfit(model, tmp_path / "start")
    expected = train(start, tmp_path / "trained")
    done = basiscli.expand(tmp_path / "trained", initial=start.adapter, output=tmp_path / "plain")
    assert (done.kind, done.modules) == ("adapter", len(modules_of(load(model))))
    plain = with_peft(model, done.path)
    config = plain.peft_config["default"]
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (4, 4, str(model))
    assert off(answer(load(model)), expected) > 0.01
    assert off(answer(plain), expected) < 1e-5
    whole = basiscli.expand(done.path, output=tmp_path / "whole")
    assert off(answer(load(whole.path)), expected) < 1e-5


def test_of_narrow_weights_too(tmp_path: Path) -> None:
    """PEFT widens what it loads, and the start is as it was stored: the same numbers in another dtype."""
    model = save(llama, tmp_path / "model", dtype=torch.bfloat16)
    start = svfit(model, tmp_path / "start")
    expected = train(start, tmp_path / "trained")
    done = basiscli.expand(tmp_path / "trained", initial=start.adapter, output=tmp_path / "plain")
    assert off(answer(load(model)), expected) > 0.1
    assert off(answer(with_peft(model, done.path)), expected) < 0.02


def test_untrained_it_is_nothing(home: Path, tmp_path: Path) -> None:
    done = basiscli.expand(home / "start" / "adapter", initial=home / "start" / "adapter", output=tmp_path / "plain")
    assert off(answer(with_peft(home / "model", done.path)), answer(load(home / "model"))) == 0
    named = basiscli.expand(
        home / "trained", initial=home / "start/adapter", base="org/name", output=tmp_path / "named"
    )
    assert json.loads((named.path / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/name"


def changed(home: Path, to: Path, change: Callable[[dict[str, Tensor]], Any], source: str = "trained") -> Path:
    """Copy an adapter and change its tensors."""
    shutil.copytree(home / source, to)
    file = to / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return to


UP = "base_model.model.model.layers.0.mlp.up_proj.tinylora_"


@pytest.mark.parametrize("part", ["A", "B", "P"])
def test_expand_refuses_what_changed_more_than_the_values(home: Path, tmp_path: Path, part: str) -> None:
    def move(tensors: dict[str, Tensor]) -> None:
        tensors[UP + part][0] += 1

    other = changed(home, tmp_path / "other", move)
    with pytest.raises(basiscli.InputError, match="more than the values") as refused:
        basiscli.expand(other, initial=home / "start" / "adapter", output=tmp_path / "out")
    assert refused.value.tensor == UP + part
    assert not list(tmp_path.glob("out*"))


def test_expand_refuses_what_is_not_the_start(home: Path, tmp_path: Path, basis: Basis) -> None:
    trained, start = home / "trained", home / "start" / "adapter"
    few = svfit(home / "model", tmp_path / "few", target_modules=["q_proj"]).adapter
    small = svfit(home / "model", tmp_path / "small", rank=3).adapter
    lora = basiscli.init(home / "model", rank=4, output=tmp_path / "lora").adapter
    bare = tmp_path / "bare"
    shutil.copytree(start, bare)
    (bare / "basis_report.json").unlink()
    moved = changed(home, tmp_path / "moved", lambda t: t["base_model.tinylora_v.3"].add_(1), "start/adapter")
    for one, initial, word in (
        (trained, few, "other modules or ranks"),
        (trained, small, "other modules or ranks"),
        (trained, lora, "this is a LORA adapter"),
        (lora, start, "this is a TINYLORA adapter"),
        (trained, trained, "not as `basis init` wrote it"),  # nothing says there which values are whose
        (trained, bare, "not as `basis init` wrote it"),
        (trained, moved, "not as `basis init` wrote it"),
        (trained, home / "model", "not an adapter"),
    ):
        refused = basis("expand", one, "--initial", initial, "-o", tmp_path / "out")
        assert refused.exit_code == 3
        assert word in refused.stderr
        assert "to do: " in refused.stderr
    assert not list(tmp_path.glob("out*"))


def test_commands_that_read_plain_lora_say_what_to_do(home: Path, tmp_path: Path, basis: Basis) -> None:
    refused = basis("expand", home / "trained", "-o", tmp_path / "out")
    assert refused.exit_code == 2
    assert "give it with --initial" in refused.stderr
    shutil.copytree(home / "trained", tmp_path / "twin")
    merge = ["merge", home / "trained", tmp_path / "twin", "--base", home / "model", "-m", "linear"]
    for words in ([*merge, "-o", tmp_path / "out"], ["diff", home / "trained", home / "model"]):
        refused = basis(*words)
        assert refused.exit_code == 3
        assert "this is a TINYLORA adapter" in refused.stderr
        assert "basis expand" in refused.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda t: t.pop(UP + "A"), "do not fit together"),
        (lambda t: t.pop("base_model.tinylora_v.2"), "not as many vectors of values"),
        (lambda t: t.update({"base_model.tinylora_v.99": torch.zeros(4)}), "not as many vectors of values"),
        (lambda t: t.update({"base_model.tinylora_v.2": torch.zeros(3)}), "has shape"),
        (lambda t: t.update({"base_model.tinylora_v.0": torch.zeros(2, 2)}), "do not fit together"),
        (lambda t: t.update({UP + "P": torch.zeros(4, 4)}), "do not fit together"),
        (lambda t: t.update({UP + "P": torch.zeros(2, 4, 4)}), "do not fit together"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(4)}), "more than trained values"),
        (lambda t: [t.pop(name) for name in list(t) if "_v." not in name], "0 modules"),
    ],
)
def test_tensors_that_do_not_belong_together(
    home: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], word: str
) -> None:
    odd = changed(home, tmp_path / "odd", change)
    for run in (basiscli.verify, basiscli.inspect):
        with pytest.raises(basiscli.InputError, match=word):
            run(odd)


def test_tinylora_that_shares_its_values_is_refused(home: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(home / "trained", odd)
    config = json.loads((odd / "adapter_config.json").read_text())
    (odd / "adapter_config.json").write_text(json.dumps(config | {"weight_tying": 0.5}))
    with pytest.raises(basiscli.InputError, match="share their values"):
        basiscli.expand(odd, initial=home / "start" / "adapter", output=tmp_path / "out")


# Refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--alpha", "4"], "no scaling multiplies"),
        (["--rslora"], "no scaling multiplies"),
        (["-r", "129"], "rank³ numbers a module"),
        (["-r", "40"], "larger than the matrix"),
        (["-r", "0"], "rank 0"),
        (["-p", "decay=1"], "no parameter 'decay'"),
        (["--calibration", "text.txt"], "looks at the weights alone"),
        (["--target-modules", "z_proj"], "no linear layer is called 'z_proj'"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(home: Path, tmp_path: Path, basis: Basis, words: list[str], message: str) -> None:
    refused = basis("init", home / "model", "-m", "svfit", "-r", "4", *words, "-o", tmp_path / "out")
    assert refused.exit_code == 2
    assert message in refused.stderr
    assert not list(tmp_path.iterdir())


def test_the_largest_rank_fits(tmp_path: Path) -> None:
    model = save(lambda: llama(hidden_size=128, intermediate_size=128, num_hidden_layers=1), tmp_path / "model")
    result = svfit(model, tmp_path / "out", rank=128, target_modules=["o_proj"])
    assert result.residual is not None
    assert off(answer(with_peft(result.residual, result.adapter)), answer(load(model))) < 1e-4


def test_a_model_whose_modules_are_not_known(home: Path, tmp_path: Path, basis: Basis) -> None:
    """Nothing says then by which number PEFT will know a module."""
    tensors = read_checkpoint(home / "model")
    config = json.loads((home / "model" / "config.json").read_text())
    odd = write_checkpoint(tmp_path / "odd", tensors, config | {"architectures": ["NoSuchModel"]})
    short = write_checkpoint(tmp_path / "short", tensors, config | {"num_hidden_layers": 1})
    for model, word in ((odd, "does not build the model"), (short, "has no module model.layers.1.mlp.down_proj")):
        refused = basis("init", model, "-m", "svfit", "-r", "4", "-o", tmp_path / "out")
        assert refused.exit_code == 3
        assert word in refused.stderr
        assert not (tmp_path / "out").exists()


def test_experts_that_the_model_fuses_are_refused(tmp_path: Path) -> None:
    model = save(mixtral, tmp_path / "model")
    with pytest.raises(basiscli.InputError, match="fuses some of the weights"):
        svfit(model, tmp_path / "out")
    result = svfit(model, tmp_path / "out", target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    assert result.residual is not None
    assert off(answer(with_peft(result.residual, result.adapter)), answer(load(model))) < 1e-5


def test_a_weight_with_nan_is_refused(home: Path, tmp_path: Path) -> None:
    tensors = read_checkpoint(home / "model")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = torch.nan
    model = write_checkpoint(tmp_path / "odd", tensors, json.loads((home / "model" / "config.json").read_text()))
    with pytest.raises(basiscli.InputError, match="NaN or Inf"):
        svfit(model, tmp_path / "out")


def test_zeros_have_no_values(tmp_path: Path) -> None:
    model = save(llama, tmp_path / "model")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in read_checkpoint(model).items()}
    config = json.loads((model / "config.json").read_text())
    result = svfit(write_checkpoint(tmp_path / "zeros", zeros, config), tmp_path / "out")
    for _, v, _, _ in stored_parts(result.adapter, modules_of(load(model))).values():
        assert not v.any()


PLUGIN = """
import torch
from basiscli import transform
@transform("init", trains="values", source="a test")
def mine(weight, rank, svd):
    "Values of mine."
    b, v, a = svd.bottom(weight, rank)
    return {result}
"""


def test_a_method_of_ones_own_trains_values(home: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN.format(result="b, v, a"))
    result = basiscli.init(home / "model", method="mine", plugins=[tmp_path / "mine.py"], rank=4, output=tmp_path / "o")
    assert result.residual is not None
    pair = with_peft(result.residual, result.adapter, is_trainable=True)
    assert off(answer(pair), answer(load(home / "model"))) < 1e-5
    assert sum(parameter.numel() for parameter in trainable(pair).values()) == 56


def test_it_has_no_start_for_a_quantised_base_whatever_it_says(home: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN.format(result="b, v, a").replace("trains=", "principal=True, trains="))
    with pytest.raises(basiscli.UsageError, match="PEFT does not load trained values on a 4-bit base"):
        basiscli.init(home / "model", method="mine", plugins=[tmp_path / "mine.py"], rank=4, quantize="nf4")


@pytest.mark.parametrize("wrong", ["b, a", "b, a, v", "b * v, v[:, None], a", "b, v * float('nan'), a", "b"])
def test_what_a_method_makes_is_checked(home: Path, tmp_path: Path, wrong: str) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN.format(result=wrong))
    with pytest.raises(basiscli.BasisError, match="mine made factors") as refused:
        basiscli.init(home / "model", method="mine", plugins=[tmp_path / "mine.py"], rank=4, output=tmp_path / "out")
    assert "B [out, rank], σ [rank] and A [rank, in]" in refused.value.remedy
