"""`basis init --quantize nf4`: factors for a residual that is loaded in 4 bits (QPiSSA)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from typer.testing import Result

import basiscli
from basiscli.linalg.nf4 import nf4_rounded
from basiscli.registry import Registry
from tests.conftest import Tensors, read_checkpoint, write_checkpoint
from tests.init_models import Interrupts, Make, check_pair, factors, gpt2, llama, off, quiet_peft, save, shards_of

pytestmark = quiet_peft
Basis = Callable[..., Result]
MODULES = {"model.layers.0.self_attn.q_proj": (96, 96), "model.layers.0.mlp.up_proj": (160, 96),
           "model.layers.0.mlp.down_proj": (96, 160)}  # fmt: skip
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
QUANTISED = [name for name in Registry().names("init") if Registry().find("init", name).principal]


def tied() -> nn.Module:
    return llama(tie_word_embeddings=True)


def wide_gpt2() -> nn.Module:
    sizes = {"vocab_size": 60, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def wide_llama() -> nn.Module:
    return llama(hidden_size=128, intermediate_size=192, num_hidden_layers=1)


def tensors() -> Tensors:
    """Return weights whose spectrum falls, as a language model's does."""
    generator, found = torch.Generator().manual_seed(0), {}
    for module, shape in MODULES.items():
        u, s, vh = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
        found[f"{module}.weight"] = (0.02 * (u * (s + 8 * s[0] / torch.arange(1, len(s) + 1))) @ vh).float()
    return found


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", tensors())


def norms(
    model: Path, result: basiscli.InitResult, *, turned: bool = False, scaling: float = 1.0
) -> dict[str, tuple[float, float, float]]:
    """Return ‖nf4(residual) + s·B·A − W‖, ‖nf4(W) − W‖ and ‖residual + s·B·A − W‖ by module, in float64."""
    assert result.residual is not None
    before, after, found = read_checkpoint(model), read_checkpoint(result.residual), {}
    for module, (b, a) in factors(result.adapter).items():
        weight, rest = (t[f"{module}.weight"].mT if turned else t[f"{module}.weight"] for t in (before, after))
        update = scaling * b.double() @ a.double()
        in_nf4, alone = nf4_rounded(rest).double() + update, nf4_rounded(weight.to(rest.dtype)).double()
        error, plain, whole = (float((t - weight.double()).norm()) for t in (in_nf4, alone, rest.double() + update))
        found[module] = error, plain, whole
    return found


# What is written ------------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("options", [{}, {"alpha": 11.0}, {"alpha": 3.0, "rslora": True}], ids=str)
@pytest.mark.parametrize("method", QUANTISED)
def test_in_full_precision_it_is_the_model_and_in_nf4_what_the_report_says(
    tmp_path: Path, method: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    model = write_checkpoint(tmp_path / "model", {n: t.to(dtype) for n, t in tensors().items()})
    result = basiscli.init(model, method=method, rank=8, quantize="nf4", output=tmp_path / "out", **options)
    scaling = options.get("alpha", 8) / (8**0.5 if "rslora" in options else 8)
    found, record = norms(model, result, scaling=scaling), result.report.adapter
    assert record is not None
    assert record.quantize == "nf4"
    assert found.keys() == MODULES.keys() == record.modules.keys()
    for module, (error, plain, whole) in found.items():
        one = record.modules[module]
        assert one.nf4_error == pytest.approx(error, rel=1e-5)
        assert one.nf4_error_qlora == pytest.approx(plain, rel=1e-5)
        assert one.norm is not None
        assert whole / one.norm < max(1e-6, torch.finfo(dtype).eps / 4)
        assert error < plain
    total, without = (math.hypot(*(entry[place] for entry in found.values())) for place in (0, 1))
    numbers = result.report.numbers
    assert numbers["nf4_error"] == pytest.approx(total, rel=1e-5)
    assert numbers["nf4_error_qlora"] == pytest.approx(without, rel=1e-5)
    assert numbers["nf4_error_reduction"] == pytest.approx(1 - total / without, rel=1e-4)


def test_it_is_five_rounds_of_the_published_algorithm(model: Path, tmp_path: Path) -> None:
    result = basiscli.init(model, rank=8, quantize="nf4", exact=True, output=tmp_path / "out")
    for module, (b, a) in factors(result.adapter).items():
        weight = tensors()[f"{module}.weight"].double()
        rest = weight
        for _ in range(5):
            u, s, vh = torch.linalg.svd(rest, full_matrices=False)
            product = (u[:, :8] * s[:8]) @ vh[:8]
            rest = weight - nf4_rounded((weight - product).float()).double()
        assert off(b @ a, product) < 1e-4
        torch.testing.assert_close(b.mT @ b, a @ a.mT, rtol=1e-3, atol=1e-4)  # balanced, as pissa's are


@pytest.mark.parametrize("method", QUANTISED)
def test_the_error_is_below_a_plain_start_s(model: Path, tmp_path: Path, method: str) -> None:
    plain = basiscli.init(model, method=method, rank=8, output=tmp_path / "plain")
    five = basiscli.init(model, method=method, rank=8, quantize="nf4", output=tmp_path / "five")
    before, after = norms(model, plain), norms(model, five)
    assert all(after[module][0] < 0.99 * before[module][0] < before[module][1] for module in MODULES)
    energy = [result.report.numbers["energy"] for result in (plain, five)]
    assert energy[1] == pytest.approx(energy[0], rel=0.05)  # still the leading part
    assert not {"nf4_error", "nf4_error_reduction"} & plain.report.numbers.keys()
    assert plain.report.adapter is not None
    assert plain.report.adapter.quantize is None


@pytest.mark.parametrize("make", [llama, gpt2, tied])
def test_stock_peft_loads_it_in_full_precision(tmp_path: Path, make: Make) -> None:
    model = save(make, tmp_path / "model")
    result = basiscli.init(model, rank=4, quantize="nf4", alpha=6, output=tmp_path / "out")
    check_pair(model, result)
    assert basiscli.verify(result.adapter).checked_digests
    assert basiscli.verify(result.residual or "").checked_digests


def test_gpt2_is_quantised_as_a_4_bit_load_turns_it(tmp_path: Path) -> None:
    """Stored [in, out]; transformers transposes a Conv1D's weight before bitsandbytes cuts it into blocks."""
    model = save(gpt2, tmp_path / "model")
    result = basiscli.init(model, rank=4, quantize="nf4", output=tmp_path / "out")
    assert result.report.adapter is not None
    assert result.residual is not None
    for module, (error, plain, _) in norms(model, result, turned=True).items():
        record = result.report.adapter.modules[module]
        assert record.nf4_error == pytest.approx(error, rel=1e-5)
        assert record.nf4_error_qlora == pytest.approx(plain, rel=1e-5)
        as_stored = read_checkpoint(model)[f"{module}.weight"]
        assert record.nf4_error_qlora != pytest.approx(float((nf4_rounded(as_stored) - as_stored).norm()), rel=1e-3)


# bitsandbytes' own kernels on a CPU want inputs in multiples of 64.
@pytest.mark.parametrize("make", [wide_llama, wide_gpt2])
@DTYPES
def test_bitsandbytes_loads_what_the_report_says(tmp_path: Path, make: Make, dtype: torch.dtype) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = save(make, tmp_path / "model", dtype=dtype)
    result = basiscli.init(model, rank=4, quantize="nf4", alpha=6, output=tmp_path / "out")
    assert result.report.adapter is not None
    four_bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    auto = transformers.AutoModelForCausalLM
    base = auto.from_pretrained(result.residual, quantization_config=four_bits, device_map="cpu")
    pair = PeftModel.from_pretrained(base, result.adapter)
    before = read_checkpoint(model)
    for module, record in result.report.adapter.modules.items():
        layer = pair.get_submodule(f"base_model.model.{module}")
        packed = layer.base_layer.weight
        weight = before[f"{module}.weight"].double()
        b, a = (getattr(layer, f"lora_{part}").default.weight.double() for part in "BA")
        total = bnb.functional.dequantize_4bit(packed.data, packed.quant_state).double() + 6 / 4 * b @ a
        error = float((total - (weight.mT if make is wide_gpt2 else weight)).norm())
        assert record.nf4_error == pytest.approx(error, rel=1e-5)


def test_zeros_and_the_whole_rank(tmp_path: Path) -> None:
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    for name, weights, reduction in (("zeros", zeros, 0.0), ("whole", tensors(), 1.0)):
        model = write_checkpoint(tmp_path / name, weights)
        result = basiscli.init(model, rank=96, quantize="nf4", output=tmp_path / f"out-{name}")
        assert result.report.numbers["nf4_error_reduction"] == pytest.approx(reduction, abs=1e-4)
        stored = load_file(result.adapter / "adapter_model.safetensors")
        assert all(bool(torch.isfinite(tensor).all()) for tensor in stored.values())


# The run --------------------------------------------------------------------------------------------------------------


def test_same_bytes_for_any_number_of_workers_and_any_shards(model: Path, tmp_path: Path) -> None:
    runs = [
        basiscli.init(model, rank=8, quantize="nf4", output=tmp_path / str(place), workers=workers, shard_size=size)
        for place, (workers, size) in enumerate([(1, "5GB"), (3, "5GB"), (2, "20kB")])
    ]
    assert len({run.report.weights_digest for run in runs}) == 1
    assert shards_of(runs[0].path) == shards_of(runs[1].path)
    assert len(list((tmp_path / "2" / "residual").glob("model-*.safetensors"))) > 1
    assert runs[0].report.numbers == runs[2].report.numbers


def test_an_interrupted_run_goes_on_and_never_with_another_start(model: Path, tmp_path: Path) -> None:
    def run(out: str, **options: Any) -> basiscli.InitResult:
        return basiscli.init(model, rank=8, output=tmp_path / out, workers=1, **options)

    whole, plain = run("whole", quantize="nf4"), run("plain")
    for interrupted, resumed, expected in (("nf4", "nf4", whole), ("nf4", None, plain), (None, "nf4", whole)):
        with pytest.raises(KeyboardInterrupt):
            run("out", quantize=interrupted, progress=Interrupts(2))
        again = run("out", quantize=resumed, overwrite=True)
        assert again.report.cost.resumed_steps == (2 if interrupted == resumed else 0)
        assert again.report.weights_digest == expected.report.weights_digest
        assert again.report.numbers == expected.report.numbers
        (tmp_path / "out").rename(tmp_path / f"out-{interrupted}-{resumed}")


# The command line -----------------------------------------------------------------------------------------------------


def test_the_command_says_how_much_it_gains(model: Path, tmp_path: Path, basis: Basis) -> None:
    out = tmp_path / "out"
    done = basis("init", model, "-r", "8", "--quantize", "nf4", "-o", out)
    assert done.exit_code == 0, done.stderr
    reduction = json.loads((out / "basis_report.json").read_text())["numbers"]["nf4_error_reduction"]
    assert f"; in NF4 its error is {reduction:.1%} below QLoRA’s\n" in done.stderr
    for folder in ("adapter", "residual"):
        assert json.loads((out / folder / "basis_report.json").read_text())["adapter"]["quantize"] == "nf4"
    again = basis("init", model, "-r", "8", "--quantize", "nf4", "-o", tmp_path / "json", "--json")
    assert json.loads(again.stdout)["numbers"]["nf4_error_reduction"] == reduction
    without = basis("init", model, "-r", "8", "-o", tmp_path / "plain")
    assert "NF4" not in without.stderr


def test_a_dry_run_says_so(model: Path, tmp_path: Path, basis: Basis) -> None:
    words = ["init", model, "-r", "8", "--quantize", "nf4", "-o", tmp_path / "out", "--dry-run"]
    assert "factors make up for a residual in nf4" in basis(*words).stdout
    assert json.loads(basis(*words, "--json").stdout)["quantize"] == "nf4"
    assert not (tmp_path / "out").exists()


# Refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted({*Registry().names("init")} - {*QUANTISED}))
def test_other_methods_have_no_such_start(model: Path, tmp_path: Path, basis: Basis, method: str) -> None:
    refused = basis("init", model, "-m", method, "-r", "4", "--quantize", "nf4", "-o", tmp_path / "out")
    assert refused.exit_code == 2
    assert f"{method} has no start for a quantised base" in refused.stderr
    assert "--method pissa" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_ours_that_have_one() -> None:
    assert QUANTISED == ["olora", "pissa"]


@pytest.mark.parametrize("word", ["fp4", "NF4", "int8", ""])
def test_other_formats_are_refused(model: Path, tmp_path: Path, basis: Basis, word: str) -> None:
    refused = basis("init", model, "-r", "4", f"--quantize={word}", "-o", tmp_path / "out")
    assert refused.exit_code == 2
    assert f"no 4-bit format is called '{word}'" in refused.stderr


PLUGIN = """
from basiscli import transform
@transform("init"{flag}, source="a test")
def halved(weight, rank, svd):
    "Half of the principal part."
    u, s, vh = svd.top(weight, rank)
    return u * s / 2, vh
"""


def test_a_plugin_says_whether_it_may_be_asked_again(model: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "halved", "rank": 4, "quantize": "nf4"}
    (tmp_path / "may.py").write_text(PLUGIN.format(flag=", principal=True"))
    (tmp_path / "not.py").write_text(PLUGIN.format(flag=""))
    result = basiscli.init(model, plugins=[tmp_path / "may.py"], output=tmp_path / "out", **options)
    assert "nf4_error" in result.report.numbers
    with pytest.raises(basiscli.UsageError, match="halved has no start"):
        basiscli.init(model, plugins=[tmp_path / "not.py"], output=tmp_path / "other", **options)


def test_what_a_method_makes_is_checked_in_every_round(model: Path, tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(
        "from basiscli import transform\nCALLS = []\n"
        '@transform("init", principal=True)\ndef odd(weight, rank):\n    "x."\n    CALLS.append(1)\n'
        "    b, a = weight[:, :rank], weight[:rank]\n    return (b, a) if len(CALLS) < 3 else (b * float('nan'), a)\n"
    )
    with pytest.raises(basiscli.BasisError, match="factors with NaN or Inf"):
        basiscli.init(model, method="odd", plugins=[tmp_path / "odd.py"], rank=4, quantize="nf4", workers=1,
                      output=tmp_path / "out")  # fmt: skip


def test_it_is_an_option_of_init_alone(model: Path, tmp_path: Path, basis: Basis) -> None:
    refused = basis("extract", model, "--base", model, "--quantize", "nf4", "-o", tmp_path / "out")
    assert refused.exit_code == 2
    assert "No such option" in refused.stderr


def test_the_pages_say_so() -> None:
    pages = Path(__file__).parents[1] / "docs" / "methods"
    assert all("--quantize nf4" in (pages / f"{method}.md").read_text() for method in QUANTISED)
    assert "BitsAndBytesConfig" in (pages / "pissa.md").read_text()
