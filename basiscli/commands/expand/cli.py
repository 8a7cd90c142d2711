"""What the terminal shows of an expansion."""

from __future__ import annotations

from dataclasses import asdict

from basiscli.cli.session import Session
from basiscli.commands.expand.api import run
from basiscli.commands.expand.options import ExpandOptions


def main(options: ExpandOptions, session: Session) -> None:
    """Expand an adapter and print where the result is."""
    out = session.out
    session.follow_up.before(None)
    done = run(options, session.progress())
    session.save(options)
    out.note(f"{done.kind}: {done.modules} modules")
    document = asdict(done) | {"path": str(done.path)}
    session.follow_up.done(document, lambda: out.line(str(done.path)), numbers={}, path=done.path)
