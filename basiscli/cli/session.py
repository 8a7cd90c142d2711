"""One call of a command at the terminal: its terminal options, and how its plan and result are shown."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from basiscli.cli.gates_and_push import GatesAndPush, known_numbers
from basiscli.cli.output import Output, Progress, ProgressStyle

if TYPE_CHECKING:
    from basiscli.cli.command import Command
    from basiscli.cli.fields import Options
    from basiscli.cli.options import Terminal
    from basiscli.reports.schema import Report


class View:
    """Shows a command's plan and result at the terminal; commands that write a model have a subclass each."""

    def document(self, plan: Any) -> dict[str, Any]:
        """Return the plan as plain data, for `--dry-run --json`."""
        raise NotImplementedError

    def show_plan(self, out: Output, plan: Any) -> None:
        """Print the plan for people."""
        raise NotImplementedError

    def summary(self, report: Report) -> str:
        """Return the lines to print after a run, from its report."""
        raise NotImplementedError

    def forecast(self, plan: Any) -> Sequence[str]:
        """Return notes to print before a run, beside the plan's."""
        return ()

    def places(self, made: Any) -> Mapping[str, Any]:
        """Return further fields of the result for `--json`, beside its path and report."""
        return {}

    def known(self, plan: Any) -> Collection[str] | None:
        """Return the names of the numbers that gates may use; None if they depend on the data."""
        return known_numbers(plan.method)


class Session:
    """One call of a command: its terminal options (`told`), and where it prints (`out`).

        def main(options: NormsOptions, session: Session) -> None:
            session.out.result(document, lambda: session.out.line("…"))

    A command with `main` gets it as the second argument.
    """

    def __init__(self, command: Command, told: Terminal) -> None:
        self.command, self.told = command, told
        self.out = Output(as_json=told.as_json, quiet=told.quiet, progress=ProgressStyle(told.progress))

    @cached_property
    def follow_up(self) -> GatesAndPush:
        """The gates and the push of this call.

        Raises:
            UsageError: a gate is not a condition, or the target not a Hub id.
        """
        told = self.told
        return GatesAndPush(
            self.out, fail_if=told.fail_if, push_to=told.push_to, private=told.private, create_pr=told.create_pr
        )

    def progress(self) -> Progress:
        """Return a progress display."""
        return self.out.progress()

    def save(self, options: Options) -> None:
        """Write the command as a recipe, if `--save-recipe` is given."""
        from basiscli.cli.save_recipe import save

        if self.told.save_recipe is not None:
            save(self.told.save_recipe, self.command, options, fail_if=self.told.fail_if, push_to=self.told.push_to)

    def check(self) -> None:
        """Check the terminal options before anything is done.

        Raises:
            UsageError: a gate is not a condition, the push target not a Hub id, or the file of `--save-recipe` exists.
        """
        from basiscli.cli.save_recipe import refuse_existing

        _ = self.follow_up
        if self.told.save_recipe is not None:
            refuse_existing(self.told.save_recipe)


def invoke(session: Session, options: Options) -> None:
    """Plan a command with these options, then run it and show the result; with `--dry-run` show the plan."""
    plan = session.command.planned(options)
    session.save(options)
    show_or_run(session, plan, session.command)


def show_or_run(session: Session, plan: Any, command: Command) -> None:
    """Run a plan and show the result; with `--dry-run` show the plan instead."""
    out, follow_up = session.out, session.follow_up
    view: View = command.load(command.view)()
    if session.told.dry_run:
        plan.close()
        out.result(view.document(plan), lambda: view.show_plan(out, plan))
        return
    follow_up.before(view.known(plan))
    for note in [*plan.notes, *view.forecast(plan)]:
        out.note(f"note: {note}")
    made = command.load(command.run)(plan, out.progress())
    for note in made.report.notes[len(plan.notes) :]:
        out.note(f"warning: {note}", warning=True)
    out.note(view.summary(made.report))
    result = {"output": str(made.path), **view.places(made)}
    result |= json.loads(made.report.model_dump_json(exclude={"tensors"}))
    follow_up.done(result, lambda: out.line(str(made.path)), numbers=made.report.numbers, path=Path(made.path))
