"""Terminal output of `basis run`: steps as they end, and plans of `--dry-run`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from basiscli.cli.output import Output
from basiscli.cli.session import Session, show_or_run
from basiscli.commands.run.options import RunOptions

if TYPE_CHECKING:
    from basiscli.commands.run.pipeline import Pipeline, StepResult
    from basiscli.commands.run.price import StepPlan


def main(options: RunOptions, session: Session) -> None:
    """Run a recipe, or print what it would cost."""
    from basiscli.cli.command import find_command
    from basiscli.commands.run.api import plan
    from basiscli.commands.run.pipeline import Pipeline
    from basiscli.commands.run.price import price
    from basiscli.errors import UsageError

    out, told, planned = session.out, session.told, plan(options)
    if not isinstance(planned, Pipeline):
        show_or_run(session, planned, find_command("merge"))
        return
    if told.fail_if or told.push_to:
        raise UsageError("--fail-if and --push-to are about one merge", remedy="a step's fail_if, and a push step")
    if told.dry_run:
        plans = price(planned)
        out.result({"steps": [one.as_dict() for one in plans]}, lambda: _show_plans(out, plans))
        return
    _run_steps(planned, out)


def _run_steps(pipeline: Pipeline, out: Output) -> None:
    """Do the steps; a gate that fails still shows what was done."""
    from basiscli.errors import GateFailed

    done: list[StepResult] = []

    def finished(step: StepResult) -> None:
        done.append(step)
        _show_step(out, step)

    def document() -> dict[str, Any]:
        return {"output": str(pipeline.folder), "steps": [step.as_dict() for step in done]}

    def text() -> None:
        out.line(str(pipeline.folder))

    try:
        pipeline.run(out.progress(), finished)
    except GateFailed as error:
        raise out.failed(error, document(), text) from error
    out.result(document(), text)


def _show_step(out: Output, step: StepResult) -> None:
    where = step.url or step.path
    state = "nothing changed" if step.done_before else "done"
    out.note(f"{step.name} ({step.command}): {state}: {where}")
    for outcome in step.gates:
        out.note(f"{'failed' if outcome.failed else 'passed'}: {outcome}")


def _show_plans(out: Output, plans: list[StepPlan]) -> None:
    from basiscli.names import format_size

    def size(number: int | None) -> str:
        return "" if number is None else format_size(number)

    rows = [
        [
            plan.name,
            plan.command,
            "nothing changed" if plan.done_before else str(plan.path or ""),
            size(plan.read_bytes),
            size(plan.write_bytes),
            size(plan.peak_bytes),
            "" if plan.price is None else plan.price.time,
        ]
        for plan in plans
    ]
    out.table(["step", "command", "output", "reads", "writes", "memory", "time"], rows, right=[3, 4, 5, 6])
