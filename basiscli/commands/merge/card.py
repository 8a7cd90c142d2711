"""The model card of a merge."""

from __future__ import annotations

from basiscli.commands.merge.page import contribute
from basiscli.commands.merge.plan import MergePlan
from basiscli.reports.card import card, front_matter
from basiscli.reports.facts import common_license
from basiscli.reports.schema import Report


def merge_card(plan: MergePlan, report: Report) -> tuple[bytes, list[str]]:
    """Return the model card (`README.md`) of a merge, and its warnings, such as inputs of different licences."""
    _, warnings = common_license(report.sources)
    library = "peft" if plan.adapter_rank is not None else "transformers"
    metadata = front_matter(_base_models(plan), "merge", report, library=library, tag="merge")
    return card(metadata, plan.out.name, report, contribute, warnings=warnings), warnings


def _base_models(plan: MergePlan) -> list[str]:
    """Return the names of everything that went in, and of the bases that adapters among it name, each once."""
    sources = [model.source for model in [*plan.models, *([plan.base] if plan.base else [])]]
    sources += [source for _, source in (plan.recipe.sources if plan.recipe else [])]
    names = (name for source in sources for name in (source.repo_id, source.base_model) if name)
    return list(dict.fromkeys(names))
