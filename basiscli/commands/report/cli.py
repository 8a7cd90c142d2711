"""`basis report`."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from basiscli.cli import options
from basiscli.cli.output import Output, errors_shown
from basiscli.errors import UsageError

if TYPE_CHECKING:
    from basiscli.commands.report.api import ReportPage


def report(
    folder: Annotated[str, typer.Argument(help="What merge, compress, init or extract made.")] = ".",
    html: Annotated[
        Path | None,
        typer.Option(
            help="File to write the page to. [default: FOLDER-report.html beside the folder]", show_default=False
        ),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown instead.")] = False,
    numbers: Annotated[bool, typer.Option("--numbers", help="Print the named numbers and what they mean.")] = False,
    evaluations: Annotated[
        list[Path] | None,
        typer.Option("--eval", help="What `basis eval --json` printed, to be shown with it; repeatable."),
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show what a run did: as a page with pictures, as Markdown, or as named numbers.

    The page is one file without scripts that loads nothing. `--json` prints the report itself, with `--numbers` the
    numbers and their meanings, and with `--html` where the page is. `--numbers` alone, in a folder without a report,
    lists every number that gates can be written over.
    """
    out = Output(as_json=json, quiet=quiet)
    with errors_shown(as_json=json):
        if (html is not None) + markdown + numbers > 1 or (markdown and json):
            raise UsageError(
                "--html, --markdown, --numbers: more than one", remedy="give one; --json goes with the others"
            )
        from basiscli.checkpoints.files import REPORT
        from basiscli.commands.report.api import report as read

        if numbers and folder == "." and not Path(REPORT).exists():
            _show_known(out)
            return
        page = read(folder, evaluations=evaluations or [])
        if numbers:
            _show_numbers(out, page)
        elif markdown:
            out.line(page.markdown())
        elif json and html is None:
            out.result(json_module.loads(page.report.model_dump_json()), lambda: None)
        else:
            written = page.write_html(html)
            out.result({"output": str(written)}, lambda: out.line(str(written)))


def _show_numbers(out: Output, page: ReportPage) -> None:
    document = {one.name: {"value": one.value, "meaning": one.meaning} for one in page.numbers}
    rows = [[one.name, f"{one.value:.10g}", one.meaning] for one in page.numbers]
    out.result(document, lambda: out.table(["number", "value", "meaning"], rows, right=[1]))


def _show_known(out: Output) -> None:
    from basiscli.reports.numbers import documented

    known = list(documented())
    out.result({name: {"meaning": meaning} for name, meaning in known}, lambda: out.table(["number", "meaning"], known))
