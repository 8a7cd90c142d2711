"""What every registered init method must do, ours and anybody's alike; and what our own are, in formulas."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import basiscli
from basiscli.registry import Registry
from tests import kv_models
from tests.conftest import Tensors, make_tensors, read_checkpoint, write_checkpoint
from tests.init_models import (
    Make,
    bert,
    bert_classifier,
    check_pair,
    factors,
    gpt2,
    llama,
    mixtral,
    off,
    quiet_peft,
    qwen2,
    save,
    shards_of,
    with_peft,
)

pytestmark = quiet_peft


def leaves_lora(name: str) -> bool:
    """Return whether a method takes a plain LoRA from the base; EVA, which does not, is in test_data_inits.py."""
    method = Registry().find("init", name)
    return not method.shares_ranks and method.trains == "factors"


METHODS = Registry().names("init")
everywhere = pytest.mark.parametrize("method", METHODS)
with_residual = pytest.mark.parametrize("method", [name for name in METHODS if leaves_lora(name)])
MODULES = {  # of `checkpoint`: rows, columns
    "model.layers.0.self_attn.q_proj": (24, 24),
    "model.layers.0.mlp.up_proj": (40, 24),
    "model.layers.0.mlp.down_proj": (24, 40),
}


def checkpoint(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """Write the shared tiny checkpoint without the matrix of no known name: transformers need not be asked."""
    tensors = {name: tensor for name, tensor in make_tensors(0, dtype).items() if "empty" not in name}
    return write_checkpoint(folder, tensors, **options)


def model_for(
    method: str, folder: Path, dtype: torch.dtype = torch.float32, shards: int = 1, changed: Tensors | None = None
) -> Path:
    """Write a model that a method can work on: one that runs, with a tokenizer, where it needs calibration."""
    if not Registry().find("init", method).needs_calibration:
        tensors, config = {n: t for n, t in make_tensors(0, dtype).items() if "empty" not in n}, None
        return write_checkpoint(folder, tensors | (changed or {}), config, shards)
    torch.manual_seed(0)
    model = kv_models.llama(num_key_value_heads=4, num_hidden_layers=1).to(dtype)
    config = model.config.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "dtype": str(dtype).removeprefix("torch."),
    }
    write_checkpoint(folder, model.state_dict() | (changed or {}), config, shards)
    kv_models.byte_tokenizer().save_pretrained(folder)
    return folder


def shapes_of(model: Path) -> dict[str, tuple[int, int]]:
    """Return the linear layers, and their rows and columns."""
    weights = {name.removesuffix(".weight"): tuple(tensor.shape) for name, tensor in read_checkpoint(model).items()}
    return {module: (shape[0], shape[1]) for module, shape in weights.items() if module.endswith("_proj")}


def run(method: str, model: Path, out: Path, **options: Any) -> basiscli.InitResult:
    """Run a method, with a short text where it looks at one."""
    if Registry().find("init", method).needs_calibration:
        text = out.parent / "text.txt"
        text.write_text(kv_models.make_text(900))
        options |= {"calibration": text, "length": 32}
    return basiscli.init(model, method=method, output=out, **options)


def parts_of(result: basiscli.InitResult) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Return (B, A, residual) by module, as they are stored."""
    assert result.residual is not None
    rest = read_checkpoint(result.residual)
    return {module: (b, a, rest[f"{module}.weight"]) for module, (b, a) in factors(result.adapter).items()}


def scaling(result: basiscli.InitResult) -> float:
    config = json.loads((result.adapter / "adapter_config.json").read_text())
    return float(config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"]))


# Every method ---------------------------------------------------------------------------------------------------------


@with_residual
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-6), (torch.float16, 3e-4), (torch.bfloat16, 1.8e-3)], ids=str
)
@pytest.mark.parametrize("options", [{}, {"alpha": 11.0}, {"alpha": 3.0, "rslora": True}], ids=str)
def test_residual_and_adapter_are_the_weight(
    tmp_path: Path, method: str, dtype: torch.dtype, bound: float, options: dict[str, Any]
) -> None:
    """As stored: to one rounding of the residual, which takes up the rounding of the factors."""
    model = model_for(method, tmp_path / "model", dtype)
    result = run(method, model, tmp_path / "out", rank=4, **options)
    weights, parts, shapes = read_checkpoint(model), parts_of(result), shapes_of(model)
    assert parts.keys() == shapes.keys()
    assert result.report.adapter is not None
    for module, (b, a, rest) in parts.items():
        assert {b.dtype, a.dtype, rest.dtype} == {dtype}
        assert (b.shape, a.shape) == ((shapes[module][0], 4), (4, shapes[module][1]))
        weight = weights[f"{module}.weight"].double()
        total = rest.double() + scaling(result) * (b.double() @ a.double())
        assert off(total, weight) <= bound
        epsilon = torch.finfo(dtype).eps  # one rounding is half of it, relative to the residual, element by element
        assert bool(((total - weight).abs() <= 0.51 * epsilon * rest.double().abs() + 5e-6).all())
        record = result.report.adapter.modules[module]
        assert record.error == pytest.approx(off(total, weight), rel=0.05, abs=1e-7)
        assert record.norm == pytest.approx(float(weight.norm()), rel=1e-5)
        rank_4 = scaling(result) * (b.double() @ a.double())
        assert record.energy == pytest.approx(1 - float((weight - rank_4).norm() / weight.norm()) ** 2, abs=1e-4)


@with_residual
def test_everything_else_is_copied(tmp_path: Path, method: str) -> None:
    model = model_for(method, tmp_path / "model", shards=2)
    result = run(method, model, tmp_path / "out", rank=4)
    assert result.residual is not None
    before, after, modules = read_checkpoint(model), read_checkpoint(result.residual), shapes_of(model)
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) == (name.removesuffix(".weight") not in modules)
    assert (result.residual / "tokenizer.json").is_file()
    assert json.loads((result.residual / "config.json").read_text()) == json.loads((model / "config.json").read_text())
    actions = {tensor.name: tensor.action for tensor in result.report.tensors}
    assert {name for name, action in actions.items() if action == "residual"} == {f"{m}.weight" for m in modules}


@with_residual
def test_same_bytes_for_any_number_of_workers_and_any_shards(tmp_path: Path, method: str) -> None:
    save(kv_models.llama, tmp_path / "model")
    kv_models.byte_tokenizer().save_pretrained(tmp_path / "model")
    found: dict[tuple[int, str], Tensors] = {}
    digests = set()
    for workers, shard_size in ((1, "5GB"), (2, "5GB"), (4, "5GB"), (3, "9kB")):
        out = tmp_path / f"{workers}"
        result = run(method, tmp_path / "model", out, rank=4, workers=workers, shard_size=shard_size)
        digests.add(result.report.weights_digest)
        found[workers, shard_size] = read_checkpoint(out / "residual") | read_checkpoint(out / "adapter")
    assert len(digests) == 1
    assert shards_of(tmp_path / "1") == shards_of(tmp_path / "2") == shards_of(tmp_path / "4")
    for tensors in found.values():
        assert all(torch.equal(tensor, found[1, "5GB"][name]) for name, tensor in tensors.items())
    sharded = tmp_path / "3"
    assert len(list((sharded / "residual").glob("model-*.safetensors"))) > 3
    index = json.loads((sharded / "residual" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == read_checkpoint(tmp_path / "model").keys()
    assert sorted(file.name for file in (sharded / "adapter").glob("*.safetensors*")) == ["adapter_model.safetensors"]
    loaded = AutoModelForCausalLM.from_pretrained(sharded / "residual").state_dict()
    assert all(torch.equal(loaded[name], found[1, "5GB"][name]) for name in index["weight_map"])


@with_residual
def test_the_whole_rank_leaves_nothing_behind(tmp_path: Path, method: str) -> None:
    model = model_for(method, tmp_path / "model")
    result = run(method, model, tmp_path / "out", rank=min(min(shape) for shape in shapes_of(model).values()))
    weights = read_checkpoint(model)
    for module, (b, a, rest) in parts_of(result).items():
        assert off(b @ a, weights[f"{module}.weight"]) < 1e-5
        assert rest.norm() < 1e-5 * weights[f"{module}.weight"].norm()
    assert result.report.numbers["energy_least"] > 1 - 1e-9


@with_residual
def test_weights_without_singular_values_of_note(tmp_path: Path, method: str) -> None:
    shapes = shapes_of(model_for(method, tmp_path / "as-it-is"))
    tensors = {f"{module}.weight": torch.zeros(shape) for module, shape in shapes.items()}
    tensors["model.layers.0.mlp.up_proj.weight"][:, 0] = 1  # of rank 1
    model = model_for(method, tmp_path / "model", changed=tensors)
    for module, (b, a, rest) in parts_of(run(method, model, tmp_path / "out", rank=3)).items():
        assert (rest + b @ a - tensors[f"{module}.weight"]).norm() < 1e-5
        assert all(bool(torch.isfinite(t).all()) for t in (b, a, rest))


@with_residual
def test_the_report_says_what_was_done(tmp_path: Path, method: str) -> None:
    model = model_for(method, tmp_path / "model")
    result = run(method, model, tmp_path / "out", rank=4, alpha=6, seed=7, exact=True)
    for folder in (tmp_path / "out", result.adapter, result.residual):
        assert folder is not None
        report = json.loads((folder / "basis_report.json").read_text())
        assert (report["command"], report["seed"], report["method"]["name"]) == ("init", 7, method)
        assert report["method"]["source"] == Registry().find("init", method).source
        record = report["adapter"]
        assert (record["rank"], record["alpha"], record["rslora"], record["exact"]) == (4, 6.0, False, True)
        assert record["modules"].keys() == shapes_of(model).keys()
        assert [source["role"] for source in report["sources"]] == ["model"]
    names = [{tensor["name"] for tensor in json.loads((f / "basis_report.json").read_text())["tensors"]}
             for f in (tmp_path / "out", tmp_path / "out" / "adapter", tmp_path / "out" / "residual")]  # fmt: skip
    assert names[0] == names[1] | names[2]
    assert not names[1] & names[2]
    count = sum(4 * (rows + columns) for rows, columns in shapes_of(model).values())
    assert result.report.numbers["adapter_parameters"] == count


@everywhere
def test_a_misspelt_parameter_is_refused(tmp_path: Path, method: str) -> None:
    with pytest.raises(basiscli.UsageError, match="no parameter 'rnak'"):
        basiscli.init(checkpoint(tmp_path / "model"), method=method, parameters={"rnak": 4}, output=tmp_path / "out")


@everywhere
def test_every_method_is_documented(method: str) -> None:
    found = Registry().find("init", method)
    assert found.summary.endswith(".")
    (number,) = re.findall(r"\d{4}\.\d{5}", found.source)
    page = (Path(__file__).parents[2] / "docs" / "methods" / f"{method}.md").read_text()
    assert number in page
    assert all(f"`{name}`" in page for name in found.parameters.model_fields)


@with_residual
def test_stock_peft_loads_and_trains_it(tmp_path: Path, method: str) -> None:
    model = save(kv_models.llama, tmp_path / "model", initializer_range=0.02)
    kv_models.byte_tokenizer().save_pretrained(model)
    result = run(method, model, tmp_path / "out", rank=4)
    check_pair(model, result)
    assert result.residual is not None
    pair = with_peft(result.residual, result.adapter, is_trainable=True).train()
    stored = factors(result.adapter)
    for name, parameter in pair.named_parameters():
        if "lora_" in name:  # what was stored, and not a new start
            module = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
            assert torch.equal(parameter, stored[module]["lora_B" not in name])
        assert parameter.requires_grad == ("lora_" in name)
    batch = torch.arange(40).reshape(2, 20)
    losses = []
    optimiser = torch.optim.SGD([p for p in pair.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        loss = pair(input_ids=batch, labels=batch).loss
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[1] < losses[0]


# Our own methods as formulas ------------------------------------------------------------------------------------------


def truncated(weight: Tensor, some: slice) -> tuple[Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return u[:, some] * s[some].sqrt(), s[some].sqrt()[:, None] * vh[some]


def qr(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    q, r = torch.linalg.qr(weight)
    return q[:, :rank], r[:rank]


FORMULAS = {
    "pissa": lambda weight, rank: truncated(weight, slice(0, rank)),
    "milora": lambda weight, rank: truncated(weight, slice(min(weight.shape) - rank, None)),
    "olora": qr,
}


@pytest.mark.parametrize("method", FORMULAS)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("rank", "alpha"), [(1, 1.0), (5, 20.0)])
def test_it_is_the_formula_in_float64(tmp_path: Path, method: str, exact: bool, rank: int, alpha: float) -> None:
    model = checkpoint(tmp_path / "model")
    result = basiscli.init(model, method=method, rank=rank, alpha=alpha, exact=exact, output=tmp_path / "out")
    weights, s = read_checkpoint(model), alpha / rank
    for module, (b, a, rest) in parts_of(result).items():
        weight = weights[f"{module}.weight"].double()
        b64, a64 = FORMULAS[method](weight, rank)
        assert off(s * b.double() @ a.double(), b64 @ a64) < 1e-5
        assert off(rest, weight - b64 @ a64) < 1e-5
        # Columns of B and rows of A are those of the formula over √s, but for the sign of each pair.
        assert off(b.double().norm(dim=0) * s**0.5, b64.norm(dim=0)) < 1e-4
        assert off(a.double().norm(dim=1) * s**0.5, a64.norm(dim=1)) < 1e-4
        torch.testing.assert_close(((b.double() / b.double().norm(dim=0)).mT @ (b64 / b64.norm(dim=0))).diag().abs(),
                                   torch.ones(rank, dtype=torch.float64), rtol=0, atol=1e-4)  # fmt: skip


def test_pissa_holds_more_than_any_other_and_milora_less(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model")
    energy = {
        method: basiscli.init(model, method=method, rank=4, output=tmp_path / method).report.numbers["energy"]
        for method in FORMULAS
    }
    assert energy["pissa"] > energy["olora"] > energy["milora"]


def test_the_fast_decomposition_leaves_the_sum_as_exact(tmp_path: Path) -> None:
    """Where it is not the singular vectors to the last digit, the residual takes up the rest."""
    weight = torch.randn(300, 420, generator=torch.Generator().manual_seed(0)) / torch.arange(1, 421) ** 0.5
    name = "model.layers.0.mlp.up_proj"
    model = write_checkpoint(tmp_path / "model", {f"{name}.weight": weight})
    fast = basiscli.init(model, rank=4, output=tmp_path / "fast")
    exact = basiscli.init(model, rank=4, output=tmp_path / "exact", exact=True)
    seeded = basiscli.init(model, rank=4, output=tmp_path / "seeded", seed=1)
    b, a, rest = parts_of(fast)[name]
    b_exact, a_exact, _ = parts_of(exact)[name]
    assert not torch.equal(b, b_exact)
    assert not torch.equal(b, parts_of(seeded)[name][0])
    assert off(b @ a, b_exact @ a_exact) < 0.02
    assert off(rest.double() + b.double() @ a.double(), weight) < 1e-6


# Kinds of models with stock PEFT --------------------------------------------------------------------------------------


# peft 0.21 fuses the factors of experts, as transformers 5 does their weights, and notices patterns of its own adding.
fused = pytest.param(
    mixtral, marks=pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
)


@pytest.mark.parametrize("make", [llama, qwen2, gpt2, bert, bert_classifier, fused])
def test_every_kind_of_model_loads_with_peft(tmp_path: Path, make: Make) -> None:
    model = save(make, tmp_path / "model")
    result = basiscli.init(model, rank=4, alpha=6, output=tmp_path / "out")
    check_pair(model, result)
    config = json.loads((result.adapter / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] == (make is gpt2)
    assert config["task_type"] == ("CAUSAL_LM" if make in (llama, qwen2, gpt2, mixtral) else None)
    assert not any(name.endswith(("lm_head", "classifier")) for name in config["target_modules"])


@pytest.mark.parametrize(
    "options",
    [{"alpha": 1.0}, {"alpha": 32.0}, {"rslora": True}, {"alpha": 5.0, "rslora": True}, {"rank": 16}, {"rank": 1}],
    ids=str,
)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_every_scaling_loads_with_peft(tmp_path: Path, make: Make, options: dict[str, Any]) -> None:
    model = save(make, tmp_path / "model")
    check_pair(model, basiscli.init(model, **{"rank": 4} | options, output=tmp_path / "out"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_weights_load_with_peft(tmp_path: Path, dtype: torch.dtype) -> None:
    model = save(llama, tmp_path / "model", dtype=dtype)
    result = basiscli.init(model, rank=4, output=tmp_path / "out")
    check_pair(model, result, tolerance=float(torch.finfo(dtype).eps), apart=0.1)


def test_another_dtype_for_everything(tmp_path: Path) -> None:
    model = save(llama, tmp_path / "model")
    result = basiscli.init(model, rank=4, output=tmp_path / "out", dtype="bf16")
    assert result.residual is not None
    for folder in (result.adapter, result.residual):
        assert {tensor.dtype for tensor in read_checkpoint(folder).values()} == {torch.bfloat16}
    assert json.loads((result.residual / "config.json").read_text())["dtype"] == "bfloat16"
    assert result.report.numbers["error_most"] < 2e-3


@pytest.mark.parametrize("published", [True, False], ids=["h.0", "transformer.h.0"])
def test_gpt2_as_it_is_published_lacks_a_prefix(tmp_path: Path, published: bool) -> None:
    """Its files say `h.0…`, the model that is loaded from them `transformer.h.0…`: PEFT knows the second only."""
    model = save(gpt2, tmp_path / "model")
    if published:
        file = model / "model.safetensors"
        save_file({n.removeprefix("transformer."): t for n, t in load_file(file).items()}, file, {"format": "pt"})
    result = basiscli.init(model, rank=4, output=tmp_path / "out", target_modules=r"transformer\.h\.\d\..*")
    check_pair(model, result)
    assert result.residual is not None
    assert read_checkpoint(result.residual).keys() == read_checkpoint(model).keys()
    assert result.report.adapter is not None
    assert all(name.startswith("transformer.h.") for name in result.report.adapter.modules)


# Targets --------------------------------------------------------------------------------------------------------------

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEAR = {f"model.layers.{n}.self_attn.{leaf}" for n in (0, 1) for leaf in ATTENTION} | {
    f"model.layers.{n}.mlp.{leaf}" for n in (0, 1) for leaf in ("gate_proj", "up_proj", "down_proj")
}


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("all-linear", LINEAR),
        (["q_proj", "v_proj"], {m for m in LINEAR if m.endswith(("q_proj", "v_proj"))}),
        (["self_attn.q_proj"], {m for m in LINEAR if m.endswith("q_proj")}),
        (["model.layers.1.mlp.up_proj"], {"model.layers.1.mlp.up_proj"}),
        (["lm_head"], {"lm_head"}),
        (r"model\.layers\.0\..*_proj", {m for m in LINEAR if ".0." in m}),
        (r".*\.(q|k)_proj", {m for m in LINEAR if m.endswith((".q_proj", ".k_proj"))}),
    ],
    ids=lambda value: f"{len(value)} modules" if isinstance(value, set) else str(value),
)
def test_targets_are_read_as_peft_reads_them(tmp_path: Path, wanted: str | list[str], expected: set[str]) -> None:
    model = save(llama, tmp_path / "model")
    result = basiscli.init(model, rank=4, output=tmp_path / "out", target_modules=wanted)
    assert set(factors(result.adapter)) == expected
    check_pair(model, result, tolerance=2e-6)
