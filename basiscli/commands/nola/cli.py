"""Terminal output of `basis compress ADAPTER --method nola`: its plan and its summary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from basiscli.cli.output import Output
from basiscli.cli.session import View
from basiscli.names import format_size

if TYPE_CHECKING:
    from basiscli.commands.nola.plan import NolaPlan
    from basiscli.reports.schema import Report


class NolaView(View):
    """Shows the plan and report of a compressed adapter at the terminal."""

    def summary(self, report: Report) -> str:
        """Return a finished compression in lines: coefficients, bytes, fidelity, seconds and memory."""
        numbers, cost = report.numbers, report.cost
        lines = [
            f"{numbers['adapter_parameters']:,.0f} coefficients, {format_size(cost.written_bytes)}: "
            f"{numbers['parameters_kept']:.1%} of the adapter's numbers, {numbers['bytes_kept']:.1%} of its bytes"
        ]
        if "kl" in numbers:
            lines.append(
                f"{numbers['fidelity']:.1%} of its effect survives: KL {numbers['kl']:.4f} of {numbers['kl_base']:.4f} "
                f"nats a token; perplexity {numbers['perplexity']:.3f}, "
                f"with the LoRA {numbers['perplexity_lora']:.3f}, without {numbers['perplexity_base']:.3f}"
            )
        else:
            lines.append(
                f"{numbers['fidelity']:.1%} of ‖ΔW‖² survives; {numbers['energy_least']:.1%} in the worst module"
            )
        return "\n".join([*lines, f"{cost.seconds:.0f} s, peak memory {format_size(cost.peak_memory_bytes)}"])

    def document(self, plan: NolaPlan) -> dict[str, Any]:
        """Return the plan as plain data, for `--dry-run --json`."""
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

    def show_plan(self, out: Output, plan: NolaPlan) -> None:
        """Print the plan, for `--dry-run`."""
        stored = sum(file.stat().st_size for file in plan.adapter.weights.files)
        out.line(f"nola {plan.adapter.source.spec} → {plan.out}")
        out.line(
            f"{len(plan.modules)} modules of rank {plan.rank}, {plan.coefficients:,} coefficients of {plan.bits} bits: "
            f"{format_size(plan.layout.nbytes)}, the adapter has {format_size(stored)}"
        )
        for note in plan.notes:
            out.line(f"note: {note}")

    def known(self, plan: NolaPlan) -> set[str]:
        """Return the names that `--fail-if` may use: those that all reports have."""
        from basiscli.reports.numbers import MEANINGS

        return set(MEANINGS)
