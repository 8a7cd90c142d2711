"""Adapters out of SmolLM2-135M-Instruct."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import basiscli
from tests.init_models import factors, off, quiet_peft
from tests.plugins.reference_data_inits import Principal, check_rows, oriented, shared_out

pytestmark = [pytest.mark.real, quiet_peft]
TARGETS = ["q_proj", "v_proj"]
IDS = torch.randint(0, 49152, (1, 48), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def parts(smollm2: Path, place: Path) -> basiscli.InitResult:
    """Return SmolLM2 taken apart into an adapter of rank 8 and what it leaves."""
    out = place / "pissa"
    return basiscli.init(smollm2, rank=8, target_modules=TARGETS, output=out)


def test_residual_and_adapter_answer_as_the_model_does(smollm2: Path, parts: basiscli.InitResult) -> None:
    assert parts.residual is not None
    base = AutoModelForCausalLM.from_pretrained(parts.residual)
    pair = PeftModel.from_pretrained(base, parts.adapter)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    with torch.no_grad():
        expected = model(IDS).logits
        assert off(pair(IDS).logits, expected) < 1e-4
        with pair.disable_adapter():
            assert off(pair(IDS).logits, expected) > 0.05
    assert parts.report.numbers["modules"] == 60
    assert parts.report.numbers["error_most"] < 1e-6
    # The quick decomposition holds what the exact one would, layer by layer.
    assert parts.report.adapter is not None
    weights = model.state_dict()
    for layer in (0, 29):
        module = f"model.layers.{layer}.self_attn.q_proj"
        squares = torch.linalg.svdvals(weights[f"{module}.weight"].double()).square()
        best = float(squares[:8].sum() / squares.sum())
        assert parts.report.adapter.modules[module].energy == pytest.approx(best, rel=0.002)


def test_what_was_taken_out_is_extracted_again(smollm2: Path, parts: basiscli.InitResult, tmp_path: Path) -> None:
    """The model differs from the residual by rank 8, in the modules that were targets."""
    assert parts.residual is not None
    found = basiscli.extract(smollm2, base=parts.residual, rank=8, target_modules=TARGETS, output=tmp_path / "lora")
    assert found.report.numbers["energy_least"] > 1 - 1e-6
    again = basiscli.merge([found.path], method="task_arithmetic", parameters={"lambda": 1}, output=tmp_path / "again")
    difference = basiscli.diff(smollm2, again.path)
    assert all(tensor.distance <= 1e-4 * tensor.norm_a for tensor in difference.tensors)


# From data ------------------------------------------------------------------------------------------------------------

HELD_OUT = Path(__file__).parents[2] / "examples" / "three-domains" / "held-out"
SOME_LAYERS = r"model\.layers\.(0|14|29)\..*"


@pytest.fixture(scope="module")
def tokens(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return 1,024 tokens of three domains."""
    text = "".join((HELD_OUT / f"{name}.txt").read_text()[:2500] for name in ("kjv", "python", "french"))
    ids = AutoTokenizer.from_pretrained(smollm2)(text, return_tensors="pt", verbose=False)["input_ids"]
    file = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    save_file({"input_ids": ids[0, :1024].reshape(8, 128).contiguous()}, file)
    return file


@pytest.fixture(scope="module")
def inputs(smollm2: Path, tokens: Path) -> dict[str, Tensor]:
    """Return what the linear layers of some layers are called with, float64, from one forward of the whole model."""
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    rows: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and any(f".layers.{layer}." in name for layer in (0, 14, 29)):

            def keep(module: torch.nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                rows[name] = args[0].flatten(0, 1).double()

            module.register_forward_pre_hook(keep)
    with torch.no_grad():
        model(load_file(tokens)["input_ids"])
    return rows


def test_eva_finds_the_principal_directions(
    smollm2: Path, tokens: Path, inputs: dict[str, Tensor], tmp_path: Path
) -> None:
    """The inputs of `down_proj` are 1,536 wide: these are decomposed by the fast way."""
    options: Any = {"calibration": tokens, "length": 128, "target_modules": SOME_LAYERS}
    result = basiscli.init(smollm2, method="eva", rank=8, output=tmp_path / "eva", **options)
    assert result.report.adapter is not None
    distinct = {id(rows): Principal(rows) for rows in inputs.values()}
    principal = {module: distinct[id(rows)] for module, rows in inputs.items()}
    ranks = {module: record.rank for module, record in result.report.adapter.modules.items()}
    assert ranks == shared_out({module: own.ratios for module, own in principal.items()}, 8, 2.0)
    for module, (b, a) in factors(result.adapter).items():
        assert not b.any()
        check_rows(a, principal[module], tolerance=1e-4)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    with torch.no_grad():
        expected = model(IDS).logits
        assert torch.equal(PeftModel.from_pretrained(model, result.adapter)(IDS).logits, expected)


def test_corda_is_the_svd_of_the_weight_as_its_inputs_see_it(
    smollm2: Path, tokens: Path, inputs: dict[str, Tensor], tmp_path: Path
) -> None:
    options: Any = {"calibration": tokens, "length": 128, "target_modules": r"model\.layers\.(0|14|29)\..*_attn.*"}
    result = basiscli.init(smollm2, method="corda", rank=8, output=tmp_path / "corda", exact=True, **options)
    assert result.residual is not None
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    weights, stored = model.state_dict(), factors(result.adapter)
    assert len(stored) == 12
    for module, (b, a) in stored.items():
        b64, a64 = oriented(weights[f"{module}.weight"].double(), inputs[module], 8, "instruction", 0.01)
        assert off(b.double() @ a.double(), b64 @ a64) < 1e-3, module
    with torch.no_grad():
        expected = model(IDS).logits
        pair = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(result.residual), result.adapter)
        assert off(pair(IDS).logits, expected) < 1e-4


def test_what_was_taken_out_needs_no_more_than_its_rank(
    smollm2: Path, parts: basiscli.InitResult, tmp_path: Path
) -> None:
    assert parts.residual is not None
    found = basiscli.extract(
        smollm2, base=parts.residual, energy=0.9999, target_modules=TARGETS, output=tmp_path / "lora"
    )
    assert found.report.numbers["energy_least"] > 0.9998
    assert 1 <= found.report.numbers["rank_least"] <= found.report.numbers["rank_most"] == 8
