"""The card of an adapter that was made from weights or from data, with a picture of its ranks where they differ."""

from __future__ import annotations

from basiscli.engine.init_plan import ADAPTER, DEFAULT_RANK, RESIDUAL, InitPlan
from basiscli.engine.init_targets import ALL_LINEAR
from basiscli.reports.card import metadata_of, render_card
from basiscli.reports.charts import rank_chart, rank_table
from basiscli.reports.schema import Report

PICTURE = "ranks.svg"


def adapter_card(plan: InitPlan, report: Report) -> dict[str, bytes]:
    """Return `README.md`, and `ranks.svg` where modules differ in rank, by name."""
    adapter, numbers = report.adapter, report.numbers
    assert adapter is not None
    base = (plan.base or plan.model).source
    metadata = metadata_of(base, "adapter", report, library="peft", tag="lora")
    ranks = {name: module.rank for name, module in adapter.modules.items()}
    shares = {name: module.energy for name, module in adapter.modules.items()}
    whole = "the inputs' variance" if plan.method.shares_ranks else "the difference" if plan.base else "the weight"
    card = render_card(
        "adapter_card.md.jinja",
        metadata,
        title=plan.out.name,
        what=f"Extracted from {plan.model.source.label}"
        if plan.base
        else f"An adapter to train, made by {plan.method.name}",
        base=f"{plan.out.name}/{RESIDUAL}" if plan.has_residual else base.label,
        folder=plan.out.name if plan.base else f"{plan.out.name}/{ADAPTER}",
        report=report,
        adapter=adapter,
        numbers=numbers,
        share=f"share of {whole}",
        rows=rank_table(ranks, shares),
        command=init_command(plan),
    )
    found = {"README.md": card}
    if numbers["rank_least"] != numbers["rank_most"]:
        found[PICTURE] = rank_chart(ranks)
    return found


def init_command(plan: InitPlan) -> str:
    """Return the command that makes this adapter."""
    words = ["basis", "extract" if plan.base else "init", plan.model.source.label]
    words += ["--base", plan.base.source.label] if plan.base else ["--method", plan.method.name]
    words += [word for name, value in plan.values for word in ("-p", f"{name}={value}")]
    if plan.energy is not None:
        words += ["--energy", f"{plan.energy:g}"]
    if plan.energy is None or plan.rank != DEFAULT_RANK:
        words += ["--rank", str(plan.rank)]
    words += ["--alpha", f"{plan.alpha:g}"] if plan.alpha is not None else []
    words += ["--rslora"] if plan.rslora else []
    words += ["--exact"] if plan.exact else []
    words += ["--quantize", plan.quantize] if plan.quantize else []
    if plan.target_modules != ALL_LINEAR:
        given = plan.target_modules if isinstance(plan.target_modules, str) else ",".join(plan.target_modules)
        words += ["--target-modules", f"'{given}'"]
    if plan.calibration is not None:
        words += ["--calibration", plan.calibration.place.rpartition("/")[2]] if plan.calibration.place else []
        words += ["--tokens", str(plan.calibration.tokens), "--length", str(plan.calibration.length)]
    words += ["--seed", str(plan.settings.seed)] if plan.settings.seed else []
    return " ".join(words)
