"""What `merge`, `init`, `extract` and `compress` do with a plan: show it, or carry it out and show what came of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from basiscli.cli.gates_and_push import GatesAndPush
from basiscli.cli.output import Output, Progress

if TYPE_CHECKING:
    from basiscli.reports.schema import Report


class Planned(Protocol):
    """A plan of any command."""

    @property
    def notes(self) -> list[str]: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class Made(Protocol):
    """What came of it."""

    @property
    def path(self) -> Path: ...  # noqa: D102
    @property
    def report(self) -> Report: ...  # noqa: D102


P = TypeVar("P", bound=Planned)
M = TypeVar("M", bound=Made)


def execute(
    plan: P,
    run: Callable[[P, Progress], M],
    out: Output,
    after: GatesAndPush,
    *,
    dry_run: bool,
    document: Callable[[P], dict[str, Any]],
    show: Callable[[Output, P], None],
    summary: Callable[[Report], str],
    known: Collection[str] | None,
    forecast: Sequence[str] = (),
    places: Callable[[M], Mapping[str, Any]] = lambda made: {},
) -> None:
    """Show a plan, or do what it says and show what came of it.

    Args:
        plan: what was planned.
        run: carries it out.
        out: where to show it.
        after: gates and push.
        dry_run: show the plan alone.
        document: the plan as plain data, for `--json`.
        show: prints the plan for people.
        summary: what a person wants to know when it is done.
        known: the numbers that gates can be over; None where only the work can tell.
        forecast: what a person wants to know before it begins, beside the plan's notes.
        places: parts of the result for `--json`, beside its path and report.
    """
    if dry_run:
        plan.close()
        out.result(document(plan), lambda: show(out, plan))
        return
    after.before(known)
    for note in [*plan.notes, *forecast]:
        out.note(f"note: {note}")
    made = run(plan, out.progress())
    for note in made.report.notes[len(plan.notes) :]:
        out.note(f"warning: {note}", warning=True)
    out.note(summary(made.report))
    result = {"output": str(made.path), **places(made)}
    result |= json.loads(made.report.model_dump_json(exclude={"tensors"}))
    after.done(result, lambda: out.line(str(made.path)), numbers=made.report.numbers, path=made.path)
