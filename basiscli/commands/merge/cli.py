"""Terminal output of `basis merge`: its plan and its summary."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from basiscli.cli.output import Output
from basiscli.cli.session import View
from basiscli.names import format_size

if TYPE_CHECKING:
    from basiscli.commands.merge.plan import MergePlan
    from basiscli.reports.schema import Report


class MergeView(View):
    """Shows a merge's plan and report at the terminal."""

    def summary(self, report: Report) -> str:
        """Return a finished merge in three lines: norms of the task vectors, scale and cosines, cost."""
        cost, lines = report.cost, []
        if report.task_vectors is not None:
            models = [source for source in report.sources if source.role != "base"]
            norms = zip(models, report.task_vectors.norms, strict=True)
            lines.append("task vectors: " + ", ".join(f"{Path(s.spec).name} {norm:.4g}" for s, norm in norms))
            cosines = [c for i, row in enumerate(report.task_vectors.cosines) for c in row[:i] if c is not None]
            merged = f"merged: norm {report.task_vectors.merged_norm:.4g}"
            merged += f", λ = {report.numbers['lambda']:.4g}" if "lambda" in report.numbers else ""
            merged += f"; inputs' cosines {min(cosines):.3f} to {max(cosines):.3f}" if cosines else ""
            lines.append(merged)
        resumed = f", {cost.resumed_steps} steps were done before" if cost.resumed_steps else ""
        lines.append(
            f"{report.numbers['tensors']:.0f} tensors, {format_size(cost.written_bytes)} in {cost.seconds:.1f} s, "
            f"peak memory {format_size(cost.peak_memory_bytes)} on {cost.device}{resumed}"
        )
        return "\n".join(lines)

    def document(self, plan: MergePlan) -> dict[str, Any]:
        """Return the plan as plain data, for `--dry-run --json`."""
        return {
            "output": str(plan.out),
            "method": plan.method.name,
            "parameters": plan.parameters,
            "base": plan.base.source.spec if plan.base else None,
            "models": [model.source.spec for model in plan.models],
            "weights": plan.weights,
            "read_bytes": plan.read_bytes,
            "write_bytes": plan.write_bytes,
            "scratch_bytes": plan.scratch_bytes,
            "peak_bytes": plan.peak_bytes,
            "price": plan.price().as_dict(),
            "notes": plan.notes,
            "files": [{"name": shard.file, "bytes": shard.nbytes} for shard in plan.layout.shards],
            "tensors": [
                {"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "bytes": t.nbytes, "file": shard.file}
                for shard in plan.layout.shards
                for t in shard.tensors
            ],
        }

    def show_plan(self, out: Output, plan: MergePlan) -> None:
        """Print the plan, for `--dry-run`: inputs, files, notes, bytes and price."""
        from basiscli.names import format_count, format_size

        parameters = "".join(f" {name}={value}" for name, value in plan.parameters.items())
        out.line(f"{plan.method.name}{parameters} → {plan.out}")
        rows = [["base", plan.base.source.spec]] if plan.base else []
        rows += [[f"model {n}", model.source.spec] for n, model in enumerate(plan.models, start=1)]
        out.table(["input", "from"], rows)
        out.line()
        sizes = [[shard.file, str(len(shard.tensors)), format_size(shard.nbytes)] for shard in plan.layout.shards]
        out.table(["file", "tensors", "size"], sizes, right=[1, 2])
        out.line()
        for note in plan.notes:
            out.line(f"note: {note}")
        workers = format_count(plan.settings.workers, "worker")
        scratch = f", scratch {format_size(plan.scratch_bytes)}" if plan.scratch_bytes else ""
        out.line(
            f"read {format_size(plan.read_bytes)}, write {format_size(plan.write_bytes)}{scratch}, "
            f"memory for tensors at most {format_size(plan.peak_bytes)} with {workers}"
        )
        out.line(plan.price().sentence())
