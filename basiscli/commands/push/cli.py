"""Terminal output of `basis push`."""

from __future__ import annotations

from basiscli.cli.gates_and_push import note_push
from basiscli.cli.session import Session
from basiscli.commands.push.api import run
from basiscli.commands.push.options import PushOptions


def main(options: PushOptions, session: Session) -> None:
    """Push, and print where it is."""
    out = session.out
    pushed = run(options, session.progress())
    note_push(out, pushed)
    out.result(pushed.as_dict(), lambda: out.line(pushed.url))
