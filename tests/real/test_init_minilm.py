"""EVA on MiniLM, an encoder with a pooler, on padded sentences."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import basiscli
from tests.init_models import factors, quiet_peft
from tests.plugins.reference_data_inits import Principal, check_rows, shared_out

pytestmark = [pytest.mark.real, quiet_peft]
TARGETS = r"encoder\.layer\.5\..*|pooler\.dense"
HELD_OUT = Path(__file__).parents[2] / "examples" / "three-domains" / "held-out"


@pytest.fixture(scope="module")
def sentences(minilm: dict[str, Path]) -> dict[str, Tensor]:
    lines = [line for line in (HELD_OUT / "kjv.txt").read_text().splitlines() if len(line) > 20][:48]
    tokenizer = AutoTokenizer.from_pretrained(minilm["base"])
    return dict(tokenizer(lines, padding=True, truncation=True, max_length=64, return_tensors="pt"))


def test_eva_finds_the_principal_directions_of_what_is_not_padding(
    minilm: dict[str, Path], sentences: dict[str, Tensor], tmp_path: Path
) -> None:
    given = {name: sentences[name].contiguous() for name in ("input_ids", "attention_mask")}
    save_file(given, tmp_path / "tokens.safetensors")
    assert not given["attention_mask"].all()
    result = basiscli.init(
        minilm["base"], method="eva", rank=8, calibration=tmp_path / "tokens.safetensors", length=64,
        target_modules=TARGETS, output=tmp_path / "eva",
    )  # fmt: skip
    model = AutoModel.from_pretrained(minilm["base"]).eval()
    rows: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if re.fullmatch(TARGETS, name) and isinstance(module, torch.nn.Linear):

            def keep(module: torch.nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                rows[name] = (args[0][given["attention_mask"] == 1] if args[0].dim() == 3 else args[0]).double()

            module.register_forward_pre_hook(keep)
    with torch.no_grad():
        expected = model(**given).last_hidden_state
        found = PeftModel.from_pretrained(AutoModel.from_pretrained(minilm["base"]).eval(), result.adapter)
        assert torch.equal(found(**given).last_hidden_state, expected)
    principal = {module: Principal(own) for module, own in rows.items()}
    assert result.report.adapter is not None
    ranks = {module: record.rank for module, record in result.report.adapter.modules.items()}
    assert len(ranks) == 7
    assert ranks == shared_out({module: own.ratios for module, own in principal.items()}, 8, 2.0)
    for module, (b, a) in factors(result.adapter).items():
        assert not b.any()
        check_rows(a, principal[module], tolerance=1e-4)
    assert result.report.adapter.calibration is not None
    assert result.report.adapter.calibration.tokens == int(given["attention_mask"].sum())
