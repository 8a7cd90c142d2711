"""The model card: what the Hub reads at the top, and below it what was done and how to do it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from basiscli.checkpoints.source import Source, is_hub_id
from basiscli.commands.merge.plan import MergePlan
from basiscli.names import printable
from basiscli.reports.blocks import Figure
from basiscli.reports.facts import common_license
from basiscli.reports.markdown import block_text, markdown, plain
from basiscli.reports.schema import Report
from basiscli.reports.sections import sections

_TEMPLATE = files("basiscli.reports") / "templates" / "card.md.jinja"
_LEFT_OUT = {"numbers", "tensors"}  # sections too long for a card


def card(
    metadata: dict[str, Any],
    title: str,
    report: Report,
    *,
    usage: str = "",
    warnings: Sequence[str] = (),
    pictures: Mapping[Figure, str] | None = None,
) -> bytes:
    """Return a card: the front matter that the Hub reads, what was done, how to use it, and the report's sections.

    Args:
        metadata: the front matter.
        title: the name of the result.
        report: of the run.
        usage: lines of Python that load the result.
        warnings: what to add to the report's notes.
        pictures: files beside the card, by the figure that they show.
    """
    import jinja2
    import yaml

    first, *others = sections(report.model_copy(update={"notes": [*report.notes, *warnings]}), cost=False)
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


def metadata_of(source: Source, relation: str, report: Report, *, library: str, tag: str) -> dict[str, Any]:
    """Return the front matter of what was made from one model; a local folder has no name that the Hub knows."""
    named = source.repo_id or source.base_model
    metadata: dict[str, Any] = {}
    if named and is_hub_id(named) and "@" not in named:
        metadata |= {"base_model": [named], "base_model_relation": relation}
    metadata["library_name"] = library
    license_word, _ = common_license(report.sources)
    if license_word:
        metadata["license"] = license_word
    return metadata | {"tags": [tag, "basis", report.method.name]}


def model_card(plan: MergePlan, report: Report) -> tuple[bytes, list[str]]:
    """Return the card's bytes, and warnings about what it says."""
    license_word, warnings = common_license(report.sources)
    metadata: dict[str, Any] = {}
    bases = _base_models(plan)
    if bases:
        metadata["base_model"] = bases
        metadata["base_model_relation"] = "merge"
    metadata["library_name"] = "peft" if plan.adapter_rank is not None else "transformers"
    if license_word:
        metadata["license"] = license_word
    metadata["tags"] = ["merge", "basis", plan.method.name]
    return card(metadata, plan.out.name, report, warnings=warnings), warnings


def _base_models(plan: MergePlan) -> list[str]:
    """Return the Hub ids of everything that went in; local folders have none to name."""
    named: list[str] = []
    sources = [model.source for model in [*plan.models, *([plan.base] if plan.base else [])]]
    for source in [*sources, *(source for _, source in (plan.recipe.sources if plan.recipe else []))]:
        for name in (source.repo_id, source.base_model):
            if name and is_hub_id(name) and "@" not in name and name not in named:
                named.append(name)
    return named
