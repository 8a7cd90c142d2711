"""The card of an adapter that was made from weights or from data, with a picture of its ranks where they differ."""

from __future__ import annotations

from basiscli.checkpoints.files import ADAPTER, RESIDUAL
from basiscli.commands.init.page import contribute, rank_grid
from basiscli.commands.init.plan import InitPlan
from basiscli.reports.card import card, metadata_of
from basiscli.reports.plots import svg
from basiscli.reports.schema import Report

PICTURE = "ranks.svg"


def adapter_card(plan: InitPlan, report: Report) -> dict[str, bytes]:
    """Return the files of an adapter's card by name: `README.md`, and `ranks.svg` where modules differ in rank."""
    assert report.adapter is not None
    base = (plan.base or plan.model).source
    named = f"{plan.out.name}/{RESIDUAL}" if plan.has_residual else base.label
    folder = plan.out.name if plan.base else f"{plan.out.name}/{ADAPTER}"
    usage = (
        f'base = AutoModelForCausalLM.from_pretrained("{named}")\n'
        f'model = PeftModel.from_pretrained(base, "{folder}", is_trainable=True)'
    )
    metadata = metadata_of(base, "adapter", report, library="peft", tag="lora")
    ranks = {name: float(module.rank) for name, module in report.adapter.modules.items()}
    if len(set(ranks.values())) == 1:
        return {"README.md": card(metadata, plan.out.name, report, contribute, usage=usage)}
    grid = rank_grid(ranks)
    return {
        "README.md": card(metadata, plan.out.name, report, contribute, usage=usage, pictures={grid: PICTURE}),
        PICTURE: svg(grid, "ranks", alone=True).encode(),
    }
