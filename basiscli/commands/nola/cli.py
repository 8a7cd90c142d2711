"""`basis compress ADAPTER --method nola`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from basiscli.cli.execute import execute
from basiscli.cli.gates_and_push import GatesAndPush
from basiscli.cli.output import Output
from basiscli.errors import UsageError
from basiscli.names import format_size

if TYPE_CHECKING:
    from basiscli.commands.nola.plan import NolaPlan
    from basiscli.reports.schema import Report


def compress_adapter(
    out: Output,
    after: GatesAndPush,
    planner: Callable[..., NolaPlan],
    adapter: str,
    *,
    bases: int | None,
    dry_run: bool,
    options: dict[str, Any],
) -> None:
    """Plan, run and show the compression of an adapter.

    Args:
        out: where to show it.
        after: gates and push.
        planner: `basiscli.plan_adapter`, or what calls it.
        adapter: folder or Hub id.
        bases: random matrices a factor.
        dry_run: show the plan alone.
        options: of `basiscli.compress_adapter`.
    """
    from basiscli.commands.nola.api import run_adapter
    from basiscli.reports.numbers import MEANINGS

    if bases is None:
        raise UsageError("--method nola needs the number of bases", remedy="--bases 256 stores 512 numbers a module")
    plan = planner(adapter, bases=bases, **options)
    execute(
        plan, run_adapter, out, after, dry_run=dry_run, document=_plan_document, show=_show_plan, summary=_summary,
        known=set(MEANINGS),
    )  # fmt: skip


def _summary(report: Report) -> str:
    numbers, cost = report.numbers, report.cost
    lines = [
        f"{numbers['adapter_parameters']:,.0f} coefficients, {format_size(cost.written_bytes)}: "
        f"{numbers['parameters_kept']:.1%} of the adapter's numbers, {numbers['bytes_kept']:.1%} of its bytes"
    ]
    if "kl" in numbers:
        lines.append(
            f"{numbers['fidelity']:.1%} of its effect survives: KL {numbers['kl']:.4f} of {numbers['kl_base']:.4f} "
            f"nats a token; perplexity {numbers['perplexity']:.3f}, with the LoRA {numbers['perplexity_lora']:.3f}, "
            f"without {numbers['perplexity_base']:.3f}"
        )
    else:
        lines.append(f"{numbers['fidelity']:.1%} of ‖ΔW‖² survives; {numbers['energy_least']:.1%} in the worst module")
    return "\n".join([*lines, f"{cost.seconds:.0f} s, peak memory {format_size(cost.peak_memory_bytes)}"])


def _plan_document(plan: NolaPlan) -> dict[str, Any]:
    return {
        "output": str(plan.out),
        "method": "nola",
        "adapter": plan.adapter.source.spec,
        "base": plan.base.source.spec if plan.base else None,
        "bases": plan.bases,
        "rank": plan.rank,
        "bits": plan.bits,
        "modules": len(plan.modules),
        "adapter_parameters": plan.coefficients,
        "steps": plan.settings.steps if plan.base else 0,
        "min_fidelity": plan.settings.min_fidelity,
        "write_bytes": plan.layout.nbytes,
        "notes": plan.notes,
    }


def _show_plan(out: Output, plan: NolaPlan) -> None:
    stored = sum(file.stat().st_size for file in plan.adapter.weights.files)
    out.line(f"nola {plan.adapter.source.spec} → {plan.out}")
    out.line(
        f"{len(plan.modules)} modules of rank {plan.rank}, {plan.coefficients:,} coefficients of {plan.bits} bits: "
        f"{format_size(plan.layout.nbytes)}, the adapter has {format_size(stored)}"
    )
    for note in plan.notes:
        out.line(f"note: {note}")
