"""Every number that any command writes has a name with a meaning."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

import basiscli
from basiscli.registry import Registry
from basiscli.reports.numbers import MEANINGS, PATTERNS, documented, is_documented, meaning_of, named
from basiscli.reports.schema import read_report
from tests.conftest import snapshot
from tests.kv_models import make_text
from tests.reports.conftest import Outputs

Basis = Callable[..., Result]
OURS = Registry().names("merge")


def test_every_number_of_every_output_is_documented(outputs: Outputs, tmp_path: Path) -> None:
    found: set[str] = set()
    for folder in outputs.folders.values():
        report = read_report(folder)
        assert report is not None
        found |= set(report.numbers)
    for file in outputs.evaluations:
        found |= set(json.loads(file.read_text())["numbers"])
    (tmp_path / "text.txt").write_text(make_text(1500))
    for method in Registry().names("init"):
        needed = {"calibration": tmp_path / "text.txt", "tokens": 512, "length": 32}
        options = needed if Registry().find("init", method).needs_calibration else {}
        made = basiscli.init(
            outputs["compress"].parent / "llama", method=method, rank=2, output=tmp_path / method, **options
        )
        found |= set(made.report.numbers)
    searched = basiscli.compress(
        outputs["compress"].parent / "llama", kv_ratio=0.5, train_steps=0, calibration=tmp_path / "text.txt", length=32,
        output=tmp_path / "kv", device="cpu",
    )  # fmt: skip
    found |= set(searched.report.numbers)
    assert {name for name in found if not is_documented(name)} == set()
    # And nothing is documented that no command writes, among the numbers of these commands.
    assert {"search_loss", "lambda", "nf4_error_reduction", "kl", "decode_speedup_8"} <= found


@pytest.mark.parametrize("method", OURS)
def test_every_merge_method_of_ours_is_documented(outputs: Outputs, tmp_path: Path, method: str) -> None:
    place = outputs["merge"].parent
    try:
        made = basiscli.merge([place / "a", place / "b"], method=method, base=place / "base", output=tmp_path / method)
    except basiscli.UsageError:
        pytest.skip("needs parameters of its own")
    assert {name for name in made.report.numbers if not is_documented(name)} == set()
    assert basiscli.report(made.path).html()


def test_names_with_a_number_in_them_have_one_meaning() -> None:
    assert meaning_of("decode_speedup_512") == PATTERNS["decode_speedup_N"]
    assert not is_documented("made_up")
    assert meaning_of("made_up") == "a number of this method"
    assert all(re.fullmatch(r"[a-z][a-zA-Z0-9_]*", name) for name, _ in documented())
    assert all(meaning and not meaning.endswith(".") for _, meaning in documented())


def test_a_later_table_wins() -> None:
    assert [(one.name, one.value) for one in named({"kl": 1.0, "tensors": 2.0}, {"kl": 3.0})] == [
        ("kl", 3.0),
        ("tensors", 2.0),
    ]


# The command ----------------------------------------------------------------------------------------------------------


def test_numbers_are_listed_with_their_meanings(basis: Basis, outputs: Outputs) -> None:
    shown = basis("report", outputs["merge"], "--numbers")
    assert shown.exit_code == 0
    for name in ("lambda", "scale", "tensors"):
        assert re.search(rf"^{name}\s+[\d.]+\s+{re.escape(MEANINGS[name])}$", shown.stdout, re.MULTILINE)
    table = json.loads(basis("report", outputs["merge"], "--numbers", "--json").stdout)
    assert table["lambda"] == {
        "value": basiscli.report(outputs["merge"]).report.numbers["lambda"],
        "meaning": MEANINGS["lambda"],
    }
    evaluated = json.loads(
        basis("report", outputs["compress"], "--eval", outputs.evaluations[0], "--numbers", "--json").stdout
    )
    assert evaluated["perplexity_increase"] == {
        "value": json.loads(outputs.evaluations[0].read_text())["numbers"]["perplexity_increase"],
        "meaning": MEANINGS["perplexity_increase"],
    }


def test_without_a_report_all_names_are_listed(basis: Basis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = basis("report", "--numbers")
    assert shown.exit_code == 0
    assert all(name in shown.stdout for name, _ in documented())
    assert basis("report", tmp_path, "--numbers").exit_code == 3  # this folder was asked for


def test_the_report_as_json_is_the_report(basis: Basis, outputs: Outputs) -> None:
    before = snapshot(outputs["merge"].parent)
    shown = basis("report", outputs["merge"], "--json")
    assert json.loads(shown.stdout) == json.loads((outputs["merge"] / "basis_report.json").read_text())
    assert snapshot(outputs["merge"].parent) == before


def test_the_command_writes_the_page_and_says_where(basis: Basis, outputs: Outputs, tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    shown = basis("report", outputs["merge"], "--html", target)
    assert shown.exit_code == 0
    assert shown.stdout.strip() == str(target)
    assert target.read_text() == basiscli.report(outputs["merge"]).html()
    assert json.loads(basis("report", outputs["merge"], "--html", target, "--json").stdout) == {"output": str(target)}


def test_inside_a_folder_the_page_goes_beside_it(
    basis: Basis, outputs: Outputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(outputs["linear"])
    shown = basis("report")
    assert shown.exit_code == 0
    page = outputs["linear"].parent / "linear-report.html"
    assert shown.stdout.strip() == str(page)
    page.unlink()


def test_markdown_is_printed(basis: Basis, outputs: Outputs) -> None:
    shown = basis("report", outputs["extract"], "--markdown")
    assert shown.exit_code == 0
    assert shown.stdout.startswith("# extracted\n\n## Summary\n")
    assert "basis extract a --base base --energy 0.9" in shown.stdout


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--markdown", "--numbers"], 2),
        (["--markdown", "--json"], 2),
        (["--html", "x.html", "--numbers"], 2),
        (["--eval", "absent.json"], 3),
        (["--html", "absent/x.html"], 6),
    ],
)
def test_bad_options_have_their_exit_codes(
    basis: Basis, outputs: Outputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int
) -> None:
    monkeypatch.chdir(tmp_path)
    assert basis("report", outputs["merge"], *words).exit_code == code
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [None, "", "{", '{"schema_version": 99}', '{"schema_version": 1}'])
def test_a_folder_without_a_sound_report_is_refused(basis: Basis, tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "basis_report.json").write_text(content)
    shown = basis("report", tmp_path)
    assert shown.exit_code == 3
    assert "basis_report.json" in shown.stderr
    assert basis("report", tmp_path / "absent").exit_code == 3
    assert not (tmp_path.parent / f"{tmp_path.name}-report.html").exists()
