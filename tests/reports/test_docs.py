"""What the documentation takes from the code is what the code says now."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from basiscli.reports.json_schema import report_schema
from basiscli.reports.numbers import documented
from tests.reports.conftest import Outputs
from tools import make_docs
from tools.chromium import Page, browser

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
AGAIN = "run `python tools/make_docs.py`"


def test_the_schema_is_current() -> None:
    assert json.loads((DOCS / "schema" / "report.schema.json").read_text()) == report_schema(), AGAIN


def test_the_command_reference_is_current() -> None:
    pinned = re.search(r"^typer==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    if pinned is None or version("typer") != pinned[1]:
        pytest.skip("another typer writes the reference in other words")
    assert (DOCS / "commands.md").read_text() == make_docs.commands(), AGAIN


def test_the_list_of_numbers_is_current() -> None:
    page = (DOCS / "numbers.md").read_text()
    assert page == make_docs.numbers(), AGAIN
    assert dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", page, re.MULTILINE)).keys() == dict(documented()).keys()


@pytest.mark.parametrize("kind", ["merge", "linear", "init", "nf4", "data", "extract", "nola", "compress"])
def test_reports_are_as_the_schema_says(outputs: Outputs, kind: str) -> None:
    report = json.loads((outputs[kind] / "basis_report.json").read_text())
    schema = report_schema()
    check(report, schema, schema["$defs"], "report")
    with pytest.raises(AssertionError):
        check(report | {"numbers": {"tensors": "many"}}, schema, schema["$defs"], "report")
    with pytest.raises(AssertionError):
        check({k: v for k, v in report.items() if k != "sources"}, schema, schema["$defs"], "report")


def check(value: object, schema: dict[str, object], known: dict[str, dict[str, object]], where: str) -> None:
    """Check a value against the part of JSON Schema that pydantic writes."""
    types = {
        "object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool,
        "null": type(None),
    }  # fmt: skip
    if "$ref" in schema:
        return check(value, known[str(schema["$ref"]).rpartition("/")[2]], known, where)
    if "anyOf" in schema:
        failures = []
        for one in schema["anyOf"]:  # type: ignore[attr-defined]
            try:
                return check(value, one, known, where)
            except AssertionError as failure:
                failures.append(str(failure))
        raise AssertionError(f"{where}: {failures}")
    if "type" in schema:
        names = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
        assert any(isinstance(value, types[name]) for name in names), f"{where}: {value!r} is no {names}"  # type: ignore[attr-defined]
    assert value in schema.get("enum", [value]), where  # type: ignore[operator]
    assert value == schema.get("const", value), where
    if isinstance(value, str) and "pattern" in schema:
        assert re.search(str(schema["pattern"]), value), where
    if isinstance(value, dict):
        assert set(schema.get("required", ())) <= value.keys(), where  # type: ignore[call-overload]
        properties, more = schema.get("properties", {}), schema.get("additionalProperties")
        for name, part in value.items():
            inner = properties.get(name, more)  # type: ignore[attr-defined]
            assert inner is not None or (more is None and not properties), f"{where}.{name} is not in the schema"
            if isinstance(inner, dict):
                check(part, inner, known, f"{where}.{name}")
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        for number, part in enumerate(value):
            check(part, schema["items"], known, f"{where}[{number}]")  # type: ignore[arg-type]
    return None


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    if find_spec("material") is None:
        pytest.skip("needs the extra 'docs'")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {page.parent.name for page in (tmp_path / "site").rglob("index.html")}
    assert {page.stem for page in DOCS.rglob("*.md") if page.stem != "index"} <= pages
    assert "not included in the" not in done.stderr  # every page has a place
    assert "fonts.googleapis" not in (tmp_path / "site" / "index.html").read_text()


def test_pictures_of_the_documentation_are_small_and_load_nothing() -> None:
    assert (DOCS / "images" / "report.png").stat().st_size < 300_000
    recording = (DOCS / "images" / "terminal.svg").read_text()
    assert "basis merge" in re.sub(r"&#160;", " ", recording)
    assert not re.search(r"url\((?!#)|@import|@font-face|<script|href=\"(?!#)", recording)
    assert "aria-label" in recording


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("kind", ["merge", "data", "compress"])
def test_a_browser_shows_every_figure(outputs: Outputs, tmp_path: Path, kind: str, dark: bool) -> None:
    if browser() is None:
        pytest.skip("needs chromium")
    import basiscli

    told = basiscli.report(outputs[kind], evaluations=outputs.evaluations if kind == "compress" else [])
    file = told.write_html(tmp_path / "page.html")
    figures = told.html().count("<figure")
    with Page(file, dark=dark) as page:
        assert page.problems == []
        assert page.loaded == [file.as_uri()]
        sizes = page.value(
            "[...document.querySelectorAll('figure svg')].map(x => x.getBoundingClientRect())"
            ".map(x => [x.width, x.height])"
        )
        assert len(sizes) == figures > 0
        assert all(width > 150 and height > 60 for width, height in sizes)
        assert page.value("document.documentElement.scrollWidth <= window.innerWidth")
        paper = page.value("getComputedStyle(document.documentElement).backgroundColor")
        assert paper == ("rgb(13, 18, 25)" if dark else "rgb(255, 255, 255)")
        # No colour of a picture is undefined: fills that CSS does not know are black.
        wrong = page.value(
            "[...document.querySelectorAll('svg [id*=\"-cell-\"] path')].map(x => getComputedStyle(x).fill)"
            ".filter(x => x === 'rgb(0, 0, 0)').length"
        )
        assert wrong == 0


def test_on_paper_and_on_a_telephone_the_page_fits(outputs: Outputs, tmp_path: Path) -> None:
    if browser() is None:
        pytest.skip("needs chromium")
    import basiscli

    file = basiscli.report(outputs["merge"]).write_html(tmp_path / "page.html")
    with Page(file, dark=True, media="print") as page:
        assert page.value("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
        assert page.value("getComputedStyle(document.querySelector('nav')).display") == "none"
    with Page(file, width=390) as page:
        assert page.value("document.documentElement.scrollWidth <= window.innerWidth")
