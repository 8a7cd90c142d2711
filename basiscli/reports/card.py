"""The model card: what the Hub reads at the top, and below it what was done and how to do it again."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from basiscli.checkpoints.source import Source, is_hub_id
from basiscli.engine.merge_plan import MergePlan
from basiscli.reports.schema import Report

_TEMPLATES = files("basiscli.reports") / "templates"


def render_card(template: str, metadata: dict[str, Any], **values: Any) -> bytes:
    """Return a card: the front matter that the Hub reads, and below it a template's text."""
    import jinja2
    import yaml

    environment = jinja2.Environment(autoescape=False, keep_trailing_newline=True)  # Markdown, not HTML
    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    return environment.from_string((_TEMPLATES / template).read_text()).render(metadata=front, **values).encode()


def metadata_of(source: Source, relation: str, report: Report, *, library: str, tag: str) -> dict[str, Any]:
    """Return the front matter of what was made from one model; a local folder has no name that the Hub knows."""
    named = source.repo_id or source.base_model
    metadata: dict[str, Any] = {}
    if named and is_hub_id(named) and "@" not in named:
        metadata |= {"base_model": [named], "base_model_relation": relation}
    metadata["library_name"] = library
    if report.sources[0].license:
        metadata["license"] = report.sources[0].license
    return metadata | {"tags": [tag, "basis", report.method.name]}


def model_card(plan: MergePlan, report: Report) -> tuple[bytes, list[str]]:
    """Return the card's bytes, and warnings about what it says."""
    license_word, warnings = _license(report)
    metadata: dict[str, Any] = {}
    bases = _base_models(plan)
    if bases:
        metadata["base_model"] = bases
        metadata["base_model_relation"] = "merge"
    metadata["library_name"] = "peft" if plan.adapter_rank is not None else "transformers"
    if license_word:
        metadata["license"] = license_word
    metadata["tags"] = ["merge", "basis", plan.method.name]
    parameters = ", ".join(f"{name} = {value}" for name, value in report.method.parameters.items())
    norms = report.task_vectors.norms if report.task_vectors else []
    models = [source for source in report.sources if source.role != "base"]
    rows = [
        source.model_dump() | {"norm": "", "spec": source.repo_id or Path(source.spec).name}
        for source in report.sources
    ]
    for row, number in zip(rows[len(rows) - len(models) :], norms, strict=False):
        row["norm"] = f"{number:.4g}"
    card = render_card(
        "model_card.md.jinja",
        metadata,
        title=plan.out.name,
        report=report,
        rows=rows,
        parameters=parameters,
        cosine=_cosine_range(report),
        notes=[*report.notes, *warnings],
        command=command_line(plan),
    )
    return card, warnings


def command_line(plan: MergePlan) -> str:
    """Return the command that makes this merge."""
    words = ["basis", "merge"]
    sources = [model.source.label for model in plan.models]
    if plan.history is not None:
        words += [*sources[1:], "--onto", sources[0]]
    else:
        words += sources
    words += ["--method", plan.method.name]
    words += [word for name, value in plan.values for word in ("-p", f"{name}={value}")]
    weights = plan.weights[1:] if plan.history is not None else plan.weights
    if any(weight != 1.0 for weight in weights):
        words += ["--weights", ",".join(f"{weight:g}" for weight in weights)]
    words += ["--base", plan.base.source.label] if plan.base else []
    words += ["--dtype", plan.settings.dtype.lower()] if plan.settings.dtype else []
    words += ["--as-adapter"] if plan.adapter_rank is not None else []
    return " ".join(words)


def _base_models(plan: MergePlan) -> list[str]:
    """Return the Hub ids of everything that went in; local folders have none to name."""
    named: list[str] = []
    for model in [*plan.models, *([plan.base] if plan.base else [])]:
        for name in (model.source.repo_id, model.source.base_model):
            if name and is_hub_id(name) and "@" not in name and name not in named:
                named.append(name)
    return named


def _license(report: Report) -> tuple[str | None, list[str]]:
    """Return the inputs' common licence; 'other' and a warning where they differ."""
    found = sorted({source.license for source in report.sources if source.license})
    if len(found) > 1:
        return "other", [f"the inputs have different licences ({', '.join(found)}): check what their mixture allows"]
    return (found[0] if found else None), []


def _cosine_range(report: Report) -> tuple[float, float] | None:
    if report.task_vectors is None:
        return None
    table = report.task_vectors.cosines
    values = [value for i, row in enumerate(table) for value in row[:i] if value is not None]
    return (min(values), max(values)) if values else None
