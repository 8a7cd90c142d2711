"""What the terminal shows of an initialisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from basiscli.cli.output import Output
from basiscli.cli.session import View
from basiscli.names import format_size

if TYPE_CHECKING:
    from basiscli.commands.init.plan import InitPlan
    from basiscli.commands.init.result import InitResult
    from basiscli.reports.schema import Report


class InitView(View):
    """Plan and report of an adapter that is made."""

    def places(self, made: InitResult) -> dict[str, str | None]:
        """Return where adapter and residual are."""
        # Not under `adapter`: the report has that for itself.
        residual = str(made.residual) if made.residual else None
        return {"adapter_folder": str(made.adapter), "residual_folder": residual}

    def summary(self, report: Report) -> str:
        """Return how well the factors hold the weights, and what it cost."""
        numbers, cost, adapter = report.numbers, report.cost, report.adapter
        assert adapter is not None
        error = f"; residual + adapter is the model to {numbers['error_most']:.1e}" if "error_most" in numbers else ""
        least, most = numbers["rank_least"], numbers["rank_most"]
        if adapter.trains == "coefficients":
            return (
                f"{numbers['modules']:.0f} modules of rank {least:.0f}, "
                f"{numbers['adapter_parameters']:,.0f} coefficients, "
                f"{format_size(cost.written_bytes)}; the base stays as it is"
            )
        of_data = adapter.calibration and "error_most" not in numbers
        nf4 = f"; in NF4 its error is {numbers['nf4_error_reduction']:.1%} below QLoRA’s" if adapter.quantize else ""
        text = f" on {adapter.calibration.tokens:,} tokens" if adapter.calibration else ""
        return (
            f"{numbers['modules']:.0f} modules of rank {least:.0f}{'' if least == most else f' to {most:.0f}'}, "
            f"{numbers['adapter_parameters']:,.0f} parameters: {numbers['energy']:.1%} of the "
            f"{'inputs’ variance' if of_data else 'energy'} ({numbers['energy_least']:.1%} at least)"
            f"{text}{error}{nf4}\n"
            f"{format_size(cost.written_bytes)} in {cost.seconds:.1f} s, "
            f"peak memory {format_size(cost.peak_memory_bytes)} on {cost.device}"
        )

    def document(self, plan: InitPlan) -> dict[str, Any]:
        """Return the plan as plain data."""
        return {
            "output": str(plan.out),
            "method": plan.method.name,
            "parameters": plan.values.model_dump(mode="json"),
            "model": plan.model.source.spec,
            "base": plan.base.source.spec if plan.base else None,
            "rank": plan.rank,
            "energy": plan.energy,
            "alpha": plan.alpha_of(plan.rank),
            "quantize": plan.quantize,
            "calibration": vars(plan.calibration) if plan.calibration else None,
            "modules": list(plan.targets.values()),
            "write_bytes": plan.expected_bytes,
            "peak_bytes": plan.peak_bytes,
            "price": plan.price().as_dict(),
            "notes": plan.notes,
        }

    def show_plan(self, out: Output, plan: InitPlan) -> None:
        """Print the plan."""
        out.line(f"{plan.method.name} {plan.model.source.spec} → {plan.out}")
        rank = f"rank {plan.rank}" if plan.ranks_known else f"mean rank {plan.rank}"
        if plan.energy is not None:
            rank = f"what rank {plan.energy:.0%} of the energy takes, {plan.rank} at most"
        trained = {"values": "singular values trained", "coefficients": "coefficients of random bases trained"}
        form = trained.get(plan.method.trains, f"scaling {plan.scaling(plan.rank):g}")
        out.line(f"{len(plan.targets)} modules of {rank}, {form}")
        if plan.quantize is not None:
            out.line(f"factors make up for a residual in {plan.quantize}")
        if plan.calibration is not None:
            text = plan.calibration.place or "built-in mix"
            out.line(f"inputs of {plan.calibration.tokens:,} tokens in windows of {plan.calibration.length}: {text}")
        for note in plan.notes:
            out.line(f"note: {note}")
        price = plan.price()
        memory = f"memory for tensors at most {format_size(plan.peak_bytes)}"
        out.line(f"read {format_size(price.read_bytes)}, write {format_size(plan.expected_bytes)}, {memory}")
        out.line(price.sentence())
