"""One call of a command at the terminal: what it was told beside its own options, and what shows the outcome."""

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
    """What the terminal shows of a command's plan and result; each command has a subclass of its own."""

    def document(self, plan: Any) -> dict[str, Any]:
        """Return the plan as plain data, for `--dry-run --json`."""
        raise NotImplementedError

    def show_plan(self, out: Output, plan: Any) -> None:
        """Print the plan for people."""
        raise NotImplementedError

    def summary(self, report: Report) -> str:
        """Return what a person wants to know when it is done."""
        raise NotImplementedError

    def forecast(self, plan: Any) -> Sequence[str]:
        """Return what a person wants to know before it begins, beside the plan's notes."""
        return ()

    def places(self, made: Any) -> Mapping[str, Any]:
        """Return parts of the result for `--json`, beside its path and report."""
        return {}

    def known(self, plan: Any) -> Collection[str] | None:
        """Return the numbers that gates can be over; None where only the work can tell."""
        return known_numbers(plan.method)


class Session:
    """What a command was told about showing, gates, pushing and saving; does what commands have in common."""

    def __init__(self, command: Command, told: Terminal) -> None:
        self.command, self.told = command, told
        self.out = Output(as_json=told.as_json, quiet=told.quiet, progress=ProgressStyle(told.progress))

    @cached_property
    def follow_up(self) -> GatesAndPush:
        """The gates and the push that follow, read from the options.

        Raises:
            UsageError: a gate is no condition, the target no Hub id.
        """
        told = self.told
        return GatesAndPush(
            self.out, fail_if=told.fail_if, push_to=told.push_to, private=told.private, create_pr=told.create_pr
        )

    def progress(self) -> Progress:
        """Return the display of progress."""
        return self.out.progress()

    def save(self, options: Options) -> None:
        """Write the command as a recipe, if that was asked for."""
        from basiscli.cli.save_recipe import save

        if self.told.save_recipe is not None:
            save(self.told.save_recipe, self.command, options, fail_if=self.told.fail_if, push_to=self.told.push_to)

    def check(self) -> None:
        """Refuse what is wrong whatever the command's own options are, before anything is done.

        Raises:
            UsageError: a gate is no condition, the target of a push no Hub id, the file of `--save-recipe` exists.
        """
        from basiscli.cli.save_recipe import refuse_existing

        _ = self.follow_up
        if self.told.save_recipe is not None:
            refuse_existing(self.told.save_recipe)


def invoke(session: Session, options: Options) -> None:
    """Plan what the options ask for; show the plan, or carry it out and show what came of it."""
    plan = session.command.planned(options)
    session.save(options)
    show_or_run(session, plan, session.command)


def show_or_run(session: Session, plan: Any, command: Command) -> None:
    """Show a plan of a command, or do what it says and show what came of it."""
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
