"""Names, notes and licences come from files that strangers made: none becomes markup, a link or a control code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

import basiscli
from basiscli.reports.markdown import plain, span
from basiscli.reports.schema import Report, read_report
from tests.reports.conftest import Outputs
from tests.reports.pages import Element, parse

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</title></style></svg><svg onload=alert(1)>",
    "--><!-- ]]>",
    "{{ 7 * 7 }}{% include 'x' %}",
    "$\\frac{1}{2$ \\unknown",
    "\x1b[31mred\x07\x00",
    "\u202eright to left\u2066",
    "![x](http://evil.example/x.png) [y](javascript:alert(1)) <http://evil.example>",
    "a | b `c` **d** ~~e~~ _f_ # g\n\n# heading\n- list\n\n```\nfence",
    "漢字 و 🙂",
    "x" * 3000,
    "&lt;b&gt; &amp; &#60;script&#62;",
]
every = pytest.mark.parametrize("name", HOSTILE)
HTML = {
    "html", "head", "meta", "title", "style", "body", "header", "p", "h1", "h2", "nav", "ul", "li", "a", "main",
    "section", "dl", "div", "dt", "dd", "table", "caption", "thead", "tbody", "tr", "th", "td", "code", "pre",
    "details", "summary", "figure", "figcaption", "footer", "svg", "desc", "defs", "g", "path", "text", "use",
    "clippath", "rect", "tspan", "lineargradient", "stop", "metadata",
}  # fmt: skip


def hostile(outputs: Outputs, kind: str, name: str, folder: Path) -> basiscli.ReportPage:
    """Return a report where a name stands wherever text can come from outside."""
    report = read_report(outputs[kind])
    assert report is not None
    table: dict[str, Any] = report.model_dump()
    table["method"] |= {"name": name, "source": name, "parameters": {name: name}}
    table["notes"] = [name, name]
    table["reproduce"] = f"basis merge {name}"
    table["numbers"] |= {name: 1.0}
    table["versions"] |= {name: name}
    for source in table["sources"]:
        source |= {"spec": name, "repo_id": name, "revision": name, "license": name, "digest": name}
    for n, tensor in enumerate(table["tensors"]):
        tensor |= {"name": f"model.layers.{n}.{name}.weight", "kind": name, "dtype": name}
    if table["kv"]:
        table["kv"] |= {"search": name, "engines": {name: name}}
        table["kv"]["calibration"] |= {"name": name}
    if table["adapter"]:
        modules = table["adapter"]["modules"]
        table["adapter"]["modules"] = {f"model.layers.{n}.{name}": m for n, m in enumerate(modules.values())}
    (folder / "basis_report.json").write_bytes(Report.model_validate(table).as_file())
    return basiscli.report(folder)


def elements(root: Element) -> list[Element]:
    return [element for child in root.children for element in (child, *elements(child))]


@every
@pytest.mark.parametrize("kind", ["merge", "data", "compress"])
def test_no_name_becomes_markup_in_the_page(outputs: Outputs, tmp_path: Path, kind: str, name: str) -> None:
    page = hostile(outputs, kind, name, tmp_path).html()
    root = parse(page)
    found = elements(root)
    assert {element.tag for element in found} <= HTML
    assert not [key for element in found for key in element.attributes if key.startswith("on")]
    assert not [e for e in found if not e.attributes.get("href", "#").startswith("#")]
    assert not [c for c in page if not (c.isprintable() or c == "\n")]
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name.replace("\n", ""))
    assert shown[:40] in root.words.replace("\n", "")


@every
@pytest.mark.parametrize("kind", ["merge", "data", "compress"])
def test_no_name_becomes_markup_in_markdown(outputs: Outputs, tmp_path: Path, kind: str, name: str) -> None:
    text = hostile(outputs, kind, name, tmp_path).markdown()
    (tmp_path / "plain").mkdir()
    plainly = hostile(outputs, kind, "harmless", tmp_path / "plain").markdown()
    assert structure(text) == structure(plainly)
    assert not [c for c in text if not (c.isprintable() or c == "\n")]


def structure(text: str) -> list[str]:
    """Return what Markdown makes of a text: headings, links, images and HTML, and the number of tables."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
    inner = [child for token in tokens for child in token.children or []]
    kept = ("heading_open", "html_block", "hr", "bullet_list_open", "fence", "table_open")
    found = [token.type for token in tokens if token.type in kept]
    found += [child.type for child in inner if child.type in ("link_open", "image", "html_inline", "s_open", "em_open")]
    return found


@every
def test_what_markdown_shows_of_a_name_is_the_name(name: str) -> None:
    inline = MarkdownIt("commonmark").enable("strikethrough").parseInline(plain(f"see {name}"))[0]
    children = inline.children or []
    assert {child.type for child in children} <= {"text", "text_special"}
    shown = "".join(child.content for child in children)
    wanted = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in f"see {name}")
    assert shown == " ".join(wanted.split())
    cell = MarkdownIt("commonmark").enable("table").parse(f"| a | b |\n|---|---|\n| {span(name)} | {plain(name)} |\n")
    assert len([token for token in cell if token.type == "td_open"]) == 2


def test_cards_of_hostile_models_are_safe(outputs: Outputs, tmp_path: Path) -> None:
    from tests.conftest import make_tensors, write_checkpoint

    note = "---\nlicense: '<b>mit</b>'\nbase_model: '](http://evil.example)'\n---\n"
    one = write_checkpoint(tmp_path / "a](http:evil.example) `x", make_tensors(0), card=note)
    two = write_checkpoint(tmp_path / "<img src=x>", make_tensors(1))
    made = basiscli.merge([one, two], method="linear", output=tmp_path / "out")
    card = (made.path / "README.md").read_text().split("---\n", 2)[2]
    found = structure(card)
    assert not {"link_open", "image", "html_inline"} & set(found)
    assert "basis merge 'a](http:evil.example) `x' '<img src=x>'" in card
