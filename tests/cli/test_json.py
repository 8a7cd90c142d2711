"""What `--json` prints is JSON, whatever the numbers are."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import Result

from basiscli.cli.output import Output
from basiscli.reports.evaluations import read_evaluation
from tests.kv_models import make_model, make_text, save_model

Basis = Callable[..., Result]


def strictly(text: str) -> Any:
    """Parse JSON as other languages do, which know no NaN."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_json_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    document = {"a": [math.nan, (1.5, -math.inf)], 7: {"b": math.inf}, "c": None, "d": True, "e": "nan", "f": 2}
    Output(as_json=True, quiet=False).result(document, lambda: None)
    expected = {"a": ["nan", [1.5, "-inf"]], "7": {"b": "inf"}, "c": None, "d": True, "e": "nan", "f": 2}
    assert strictly(capsys.readouterr().out) == expected


def test_a_model_whose_perplexity_is_no_number(basis: Basis, tmp_path: Path) -> None:
    model, text, file = make_model(), tmp_path / "text.txt", tmp_path / "eval.json"
    text.write_text(make_text(600))
    save_model(tmp_path / "dense", model)
    model.model.norm.weight.data.fill_(torch.nan)
    save_model(tmp_path / "broken", model)
    words = ["eval", tmp_path / "broken", "--against", tmp_path / "dense", "--text", text, "--length", "32", "--json"]
    result = basis(*words)
    assert result.exit_code == 0, result.stderr
    document = strictly(result.stdout)
    assert (document["model"]["perplexity"], document["numbers"]["perplexity"]) == ("nan", "nan")
    assert document["against"]["perplexity"] > 1
    file.write_text(result.stdout)
    assert math.isnan(read_evaluation(file).model.perplexity)  # as `basis report --eval` reads it
    failed = basis(*words, "--fail-if", "kl > 0.1")
    assert failed.exit_code == 4
    assert strictly(failed.stdout)["gates"][0]["cause"] == "kl is not a number"
