"""`basis demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from basiscli.cli import options
from basiscli.cli.output import Output, errors_shown

if TYPE_CHECKING:
    from basiscli.commands.demo.api import Demo


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make.")] = Path("basis-demo"),
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Merge two published fine-tunes of MiniLM and measure what the result kept of both. Needs no network."""
    out = Output(as_json=json, quiet=quiet)
    with errors_shown(as_json=json):
        from basiscli.commands.demo.api import demo as api_demo

        found = api_demo(output, progress=out.progress())
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
