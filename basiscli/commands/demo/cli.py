"""Options and terminal output of `basis demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from basiscli.cli.fields import Options, option
from basiscli.cli.output import Output
from basiscli.cli.session import Session

if TYPE_CHECKING:
    from basiscli.commands.demo.api import Demo


class DemoOptions(Options):
    """Options of `basis demo`."""

    output: Annotated[Path, option("Folder to make.", "-o")] = Path("basis-demo")


def main(options: DemoOptions, session: Session) -> None:
    """Run the demo and print what it measured."""
    from basiscli.commands.demo.api import demo

    out, found = session.out, demo(options.output, progress=session.progress())
    out.result(found.as_dict(), lambda: _show(out, found))


def _show(out: Output, found: Demo) -> None:
    out.line("$ " + found.command)
    out.line()
    rows = [[name, *(f"{value:.3f}" for value in scores.values())] for name, scores in found.scores.items()]
    out.table(["model", *next(iter(found.scores.values()))], rows, right=[1, 2])
    out.line()
    for line in found.reading:
        out.line(line)
    out.line(str(found.path))
