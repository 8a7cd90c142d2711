"""The page: given an output of any transform, when its report is rendered, then anybody can read it anywhere."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path

import pytest

import basiscli
from basiscli.reports.schema import Report, read_report
from tests.conftest import snapshot
from tests.reports.conftest import Outputs
from tests.reports.pages import Element, parse

ORDER = [
    "summary", "inputs", "method", "evaluation", "task-vectors", "layers", "spectra", "training", "engines", "cost",
    "numbers", "tensors", "versions",
]  # fmt: skip
ALWAYS = {"summary", "inputs", "method", "cost", "numbers", "tensors", "versions"}
OWN = {
    "merge": {"task-vectors", "layers"},
    "linear": set(),
    "init": {"layers", "spectra"},
    "nf4": {"layers", "spectra"},
    "data": {"layers", "spectra"},
    "extract": {"layers", "spectra"},
    "nola": {"layers"},
    "compress": {"layers", "spectra", "training", "engines", "evaluation"},
}
kinds = pytest.mark.parametrize("kind", OWN)


def page_of(outputs: Outputs, kind: str) -> basiscli.ReportPage:
    return basiscli.report(outputs[kind], evaluations=outputs.evaluations if kind == "compress" else [])


@kinds
def test_every_transform_has_the_same_sections_in_the_same_order(outputs: Outputs, kind: str) -> None:
    keys = [section.key for section in page_of(outputs, kind).sections]
    assert keys == [key for key in ORDER if key in keys]
    assert set(keys) == ALWAYS | OWN[kind]


@kinds
def test_the_page_loads_nothing_and_runs_nothing(outputs: Outputs, kind: str) -> None:
    page = page_of(outputs, kind).html()
    root = parse(page)
    assert not root.find("script", "link", "iframe", "object", "embed", "img", "image", "form", "base", "video")
    for element in root.find(*set(re.findall(r"<([a-zA-Z]\w*)", page))):
        for name, value in element.attributes.items():
            assert not name.startswith("on")
            if name in ("href", "src", "xlink:href"):
                assert value.startswith("#"), f"{element.tag} {name}={value}"
            assert not re.search(r"url\((?!#)|@import|javascript:", value)
    for style in root.find("style"):
        assert not re.search(r"url\(|@import|expression|http", style.words)
    policy = [e.attributes for e in root.find("meta") if e.attributes.get("http-equiv") == "Content-Security-Policy"]
    assert policy[0]["content"].startswith("default-src 'none'")


@kinds
def test_the_page_can_be_read_aloud(outputs: Outputs, kind: str) -> None:
    root = parse(page_of(outputs, kind).html())
    assert root.find("html")[0].attributes["lang"] == "en"
    assert root.find("title")[0].words
    levels = [int(heading.tag[1]) for heading in root.find("h1", "h2", "h3", "h4", "h5", "h6")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    everything = _all(root)
    ids = [e.attributes["id"] for e in everything if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    texts = {e.attributes["id"]: e.words for e in everything if "id" in e.attributes}
    references = [e.attributes["xlink:href"] for e in everything if "xlink:href" in e.attributes]
    references += [e.attributes["href"] for e in everything if "href" in e.attributes]
    assert {reference[1:] for reference in references} <= set(ids)
    assert set(re.findall(r"url\(#([^)]*)\)", str([e.attributes for e in everything]))) <= set(ids)
    for figure in root.find("figure"):
        (picture,) = figure.find("svg")
        assert picture.attributes["role"] == "img"
        said = [texts[key] for key in picture.attributes["aria-labelledby"].split()]
        assert len(said) == 2 and all(len(words) > 10 for words in said)
        assert figure.find("figcaption")[0].words.strip()
        assert figure.find("td")
    for table in root.find("table"):
        assert table.find("caption")[0].words.strip()
        assert {len(row.children) for row in table.find("tr")} == {len(table.find("tr")[0].children)}


def _all(root: Element) -> list[Element]:
    return [element for child in root.children for element in (child, *_all(child))]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_colours_of_the_page_are_far_enough_apart(outputs: Outputs, theme: str) -> None:
    style = parse(page_of(outputs, "merge").html()).find("style")[0].words
    light, dark = re.findall(r":root\{(?:color-scheme:[\w ]+;)?((?:--\w+:#[0-9a-f]{6};)+)\}", style)
    colours = dict(re.findall(r"--(\w+):(#[0-9a-f]{6});", light if theme == "light" else dark))
    assert len(colours) > 50
    for ink in ("ink", "muted", "accent"):
        for paper in ("page", "card"):
            assert ratio(colours[ink], colours[paper]) >= 4.5, (ink, paper)
    for name in [name for name in colours if re.fullmatch(r"[hd]\d+", name)]:
        assert ratio(colours[f"{name}t"], colours[name]) >= 4.5, name
    for number in range(6):
        assert ratio(colours[f"s{number}"], colours["page"]) >= 3, number
    assert ratio(colours["h0"], colours["h23"]) > 6
    # What is used is defined.
    used = set(re.findall(r"var\(--(\w+)\)", page_of(outputs, "merge").html()))
    assert used <= colours.keys()


def ratio(one: str, other: str) -> float:
    """Return the contrast of WCAG 2, written out from its definition."""

    def light(colour: str) -> float:
        channels = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    return (max(light(one), light(other)) + 0.05) / (min(light(one), light(other)) + 0.05)


def test_the_contrast_is_that_of_known_pairs() -> None:
    assert ratio("#000000", "#ffffff") == pytest.approx(21)
    assert ratio("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)


@kinds
def test_the_same_report_gives_the_same_page(outputs: Outputs, kind: str) -> None:
    assert page_of(outputs, kind).html() == page_of(outputs, kind).html()


def test_every_cell_says_what_it_is(outputs: Outputs) -> None:
    report = basiscli.report(outputs["merge"]).report
    root = parse(basiscli.report(outputs["merge"]).html())
    titles = [title.words for title in root.find("title")]
    for tensor in report.tensors:
        if tensor.kind == "linear" and tensor.base_norm and tensor.merged_norm is not None:
            row = tensor.name.removesuffix(".weight").partition(".0.")[2]
            assert f"{row}, layer 0: {100 * tensor.merged_norm / tensor.base_norm:.2f}" in titles


def test_a_report_of_an_earlier_release_is_rendered(outputs: Outputs, tmp_path: Path) -> None:
    for kind in ("merge", "data", "compress"):
        table = json.loads((outputs[kind] / "basis_report.json").read_text())
        del table["reproduce"]
        for record in [*table["tensors"], table["kv"] or {}, *((table["adapter"] or {}).get("modules") or {}).values()]:
            for name in ("base_norm", "key_energy", "value_energy", "spectrum"):
                record.pop(name, None)
        (tmp_path / "basis_report.json").write_text(json.dumps(table))
        page = basiscli.report(tmp_path)
        keys = [section.key for section in page.sections]
        assert "spectra" not in keys
        assert "layers" in keys
        assert parse(page.html()).find("figure")


def test_numbers_that_are_none_are_left_out_of_the_pictures(outputs: Outputs, tmp_path: Path) -> None:
    report = read_report(outputs["merge"])
    assert report is not None
    broken = [t.model_copy(update={"norms": [float("nan")] * 3, "merged_norm": float("inf")}) for t in report.tensors]
    vectors = report.task_vectors
    assert vectors is not None
    holes = vectors.model_copy(update={"cosines": [[None] * 3] * 3, "norms": [float("nan")] * 3})
    odd = report.model_copy(update={"tensors": broken, "task_vectors": holes})
    (tmp_path / "basis_report.json").write_bytes(odd.as_file())
    page = basiscli.report(tmp_path)
    assert parse(page.html()).find("figure")
    assert "nan" in page.markdown()


def test_a_large_model_makes_a_page_of_bounded_size(outputs: Outputs, tmp_path: Path) -> None:
    report = read_report(outputs["merge"])
    assert report is not None
    one = next(tensor for tensor in report.tensors if tensor.kind == "linear")
    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.{leaf}_proj.weight"
        for layer in range(90)
        for expert in range(40)
        for leaf in ("up", "down", "gate")
    ] + [f"model.layers.{layer}.odd_{n}.weight" for layer in range(2) for n in range(300)]
    large = report.model_copy(update={"tensors": [one.model_copy(update={"name": name}) for name in names]})
    (tmp_path / "basis_report.json").write_bytes(large.as_file())
    page = basiscli.report(tmp_path)
    text = page.html()
    assert len(text) < 6_000_000
    assert "mlp.experts.*.up_proj" in text
    assert "263 more rows are left out" in text
    assert "6,400 more are in basis_report.json" in text


# Where it goes --------------------------------------------------------------------------------------------------------


def test_the_page_goes_beside_the_folder_which_stays_as_it_was(outputs: Outputs) -> None:
    before = snapshot(outputs["merge"])
    written = basiscli.report(outputs["merge"]).write_html()
    assert written == outputs["merge"].parent / "merged-report.html"
    assert snapshot(outputs["merge"]) == before
    assert basiscli.report(outputs["merge"]).write_html() == written  # an earlier page is replaced
    written.unlink()


def test_a_page_inside_the_folder_does_not_disturb_verification_or_merging_it(outputs: Outputs, tmp_path: Path) -> None:
    inside = outputs["merge"] / "report.html"
    basiscli.report(outputs["merge"]).write_html(inside)
    try:
        assert basiscli.verify(outputs["merge"]).checked_digests
        again = basiscli.merge([outputs["merge"], outputs["linear"]], method="linear", output=tmp_path / "again")
        assert not (again.path / "report.html").exists()
    finally:
        inside.unlink()


def test_nothing_but_a_page_is_replaced(outputs: Outputs, tmp_path: Path) -> None:
    page = basiscli.report(outputs["merge"])
    for name in ("notes.html", "model.safetensors"):
        (tmp_path / name).write_text("<p>mine</p>")
        with pytest.raises(basiscli.UsageError, match="no report"):
            page.write_html(tmp_path / name)
        assert (tmp_path / name).read_text() == "<p>mine</p>"
    with pytest.raises(basiscli.UsageError):
        page.write_html(tmp_path)
    with pytest.raises(basiscli.ResourceError):
        page.write_html(tmp_path / "no" / "such" / "place.html")


def test_adapters_have_a_report_of_their_own(outputs: Outputs) -> None:
    whole, part = basiscli.report(outputs["init"]), basiscli.report(outputs["init"] / "adapter")
    assert len(part.report.tensors) < len(whole.report.tensors)
    assert part.report.adapter == whole.report.adapter
    assert parse(part.html()).find("figure")


def test_records_are_frozen(outputs: Outputs) -> None:
    page = basiscli.report(outputs["merge"])
    assert isinstance(page.report, Report)
    with pytest.raises(dataclasses.FrozenInstanceError):
        page.folder = Path()  # type: ignore[misc]
