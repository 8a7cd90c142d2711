"""The model card: what the Hub reads at the top, and below it what was done and how to do it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from basiscli.checkpoints.source import Source, is_hub_id
from basiscli.names import printable
from basiscli.reports.blocks import Figure
from basiscli.reports.contribution import Contributor
from basiscli.reports.facts import common_license
from basiscli.reports.markdown import block_text, markdown, plain
from basiscli.reports.page import sections
from basiscli.reports.schema import Report

_TEMPLATE = files("basiscli.reports") / "templates" / "card.md.jinja"
_LEFT_OUT = {"numbers", "tensors"}  # sections too long for a card


def card(
    metadata: dict[str, Any],
    title: str,
    report: Report,
    contribute: Contributor,
    *,
    usage: str = "",
    warnings: Sequence[str] = (),
    pictures: Mapping[Figure, str] | None = None,
) -> bytes:
    """Return the bytes of `README.md`: front matter, what was done, how to use it, and the report's sections.

    Args:
        metadata: the front matter, which the Hub reads: see `front_matter`.
        title: the name of the result.
        report: of the run.
        contribute: gives what the command that ran says beside what all reports say.
        usage: lines of Python that load the result.
        warnings: what to add to the report's notes.
        pictures: files beside the card, by the figure that they show.
    """
    import jinja2
    import yaml

    noted = report.model_copy(update={"notes": [*report.notes, *warnings]})
    first, *others = sections(noted, contribute, cost=False)
    opening = "\n".join(block_text(block, {}) for block in first.blocks)
    environment = jinja2.Environment(
        autoescape=False, trim_blocks=True, keep_trailing_newline=True
    )  # Markdown, not HTML: `markdown` and the YAML writer make their text safe
    return (
        environment.from_string(_TEMPLATE.read_text())
        .render(
            metadata=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True),
            title=plain(title),
            opening=opening,
            usage=printable(usage),
            body=markdown([s for s in others if s.key not in _LEFT_OUT], pictures),
            report=report,
        )
        .encode()
    )


def front_matter(
    base_models: Sequence[str], relation: str, report: Report, *, library: str, tag: str
) -> dict[str, Any]:
    """Return what the Hub reads at the top of a card: base models, library, licence and tags.

    Args:
        base_models: names of what the result was made from; those that are no Hub ids are left out.
        relation: of the result to them, in the Hub's words: `merge`, `adapter`, `quantized`.
        report: of the run.
        library: that loads the result: `transformers` or `peft`.
        tag: what the Hub lists the result under, beside `basis` and the method's name.
    """
    metadata: dict[str, Any] = {}
    named = [name for name in base_models if is_hub_id(name) and "@" not in name]
    if named:
        metadata |= {"base_model": named, "base_model_relation": relation}
    metadata["library_name"] = library
    license_word, _ = common_license(report.sources)
    if license_word:
        metadata["license"] = license_word
    return metadata | {"tags": [tag, "basis", report.method.name]}


def metadata_of(source: Source, relation: str, report: Report, *, library: str, tag: str) -> dict[str, Any]:
    """Return the front matter of what was made from one model: its own name on the Hub, or that of its base."""
    named = source.repo_id or source.base_model
    return front_matter([named] if named else [], relation, report, library=library, tag=tag)
