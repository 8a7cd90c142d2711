"""Terminal output of `basis compress` for a KV cache: its plan and its summary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from basiscli.cli.output import Output
from basiscli.cli.session import View
from basiscli.names import format_size

if TYPE_CHECKING:
    from basiscli.commands.kv.plan import KVPlan
    from basiscli.reports.schema import Report


class KVView(View):
    """Shows the plan and report of a KV compression at the terminal."""

    def forecast(self, plan: KVPlan) -> list[str]:
        """Return lines printed before the run: calibration text, training steps, estimated cost."""
        return [*self._advice(plan), plan.price().sentence()]

    def _advice(self, plan: KVPlan) -> list[str]:
        lines = []
        if plan.settings.calibration is None:
            lines.append("calibration with the small built-in mix; text of your own kind is better: --calibration FILE")
        if plan.train_steps:
            tokens = f"{plan.settings.batch} × {plan.settings.length} tokens"
            lines.append(f"training {plan.train_steps} steps of {tokens}")
        return lines

    def summary(self, report: Report) -> str:
        """Return a finished compression in lines: kept dimensions, bytes per token, search, seconds of each part."""
        kv, cost = report.kv, report.cost
        assert kv is not None
        keys, values = (sum(map(sum, ranks)) / sum(map(len, ranks)) for ranks in (kv.key_ranks, kv.value_ranks))
        lines = [
            f"removed {1 - kv.kept:.1%}, kept {kv.kept:.1%}: {kv.kept * kv.head_dim:.1f} of {kv.head_dim} dims a head "
            f"on average ({keys:.1f} of keys, {values:.1f} of values); {kv.bytes_per_token:,} bytes a token, "
            f"{kv.dense_bytes_per_token:,} before"
        ]
        each = (cost.seconds_of or {}).get("a round of the search")
        if each is not None:
            lines.append(
                f"searched in {report.numbers['search_rounds']:.0f} rounds of "
                f"{each:.2f} s; KL to the dense model {report.numbers['search_kl']:.4f}"
            )
        parts = ", ".join(
            f"{name} {seconds:.0f} s" for name, seconds in (cost.seconds_of or {}).items() if seconds >= 0.5
        )
        peak = format_size(cost.peak_memory_bytes)
        lines.append(f"{cost.seconds:.0f} s ({parts}), peak memory {peak} on {cost.device}")
        return "\n".join(lines)

    def document(self, plan: KVPlan) -> dict[str, Any]:
        """Return the plan as plain data, for `--dry-run --json`."""
        return {
            "output": str(plan.out),
            "method": plan.method.name,
            "parameters": plan.values.model_dump(mode="json"),
            "model": plan.model.source.spec,
            "kv_ratio": plan.ratio,
            "kept": plan.kept,
            "layers": plan.shape.layers,
            "kv_heads": plan.shape.heads,
            "head_dim": plan.shape.dim,
            "train_steps": plan.train_steps,
            "train_tokens": plan.train_tokens,
            "search": plan.settings.search,
            "write_bytes": plan.layout.nbytes,
            "peak_bytes": plan.peak_bytes,
            "price": plan.price().as_dict(),
            "notes": plan.notes,
        }

    def show_plan(self, out: Output, plan: KVPlan) -> None:
        """Print the plan, for `--dry-run`."""
        out.line(f"{plan.method.name} {plan.model.source.spec} → {plan.out}")
        out.line(
            f"{plan.shape.layers} layers of {plan.shape.heads} KV heads of {plan.shape.dim} dimensions: "
            f"removed {1 - plan.kept:.1%}, kept {plan.kept:.1%}, {plan.kept * plan.shape.dim:.1f} dims a head"
        )
        for note in [*plan.notes, *self._advice(plan)]:
            out.line(f"note: {note}")
        price = plan.price()
        memory = f"memory for tensors about {format_size(plan.peak_bytes)}"
        out.line(f"read {format_size(price.read_bytes)}, write {format_size(price.write_bytes)}, {memory}")
        out.line(price.sentence())
