"""Adapters out of SmolLM2-135M-Instruct."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import basiscli
from tests.init_models import off, quiet_peft

pytestmark = [pytest.mark.real, quiet_peft]
TARGETS = ["q_proj", "v_proj"]
IDS = torch.randint(0, 49152, (1, 48), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def parts(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> basiscli.InitResult:
    """Return SmolLM2 taken apart into an adapter of rank 8 and what it leaves."""
    out = tmp_path_factory.mktemp("init") / "pissa"
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
