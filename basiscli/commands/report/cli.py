"""Options and terminal output of `basis report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from basiscli.cli.fields import ModelName, Options, argument, option
from basiscli.cli.output import Output
from basiscli.cli.session import Session
from basiscli.errors import UsageError

if TYPE_CHECKING:
    from basiscli.commands.report.api import ReportPage


class ReportOptions(Options):
    """Options of `basis report`."""

    folder: Annotated[ModelName, argument("What merge, compress, init or extract made.")] = "."
    html: Annotated[
        Path | None,
        option("File to write the page to.", default="FOLDER-report.html beside the folder"),
    ] = None
    markdown: Annotated[bool, option("Print Markdown instead.")] = False
    numbers: Annotated[bool, option("Print the named numbers and what they mean.")] = False
    evaluations: Annotated[
        list[Path],
        option(
            "What `basis eval --json` printed, to be shown with it; repeatable.", "--eval", metavar="FILE", repeat=True
        ),
    ] = []  # noqa: RUF012


def main(options: ReportOptions, session: Session) -> None:
    """Show a report in the form that was asked for."""
    out, as_json = session.out, session.told.as_json
    if (options.html is not None) + options.markdown + options.numbers > 1 or (options.markdown and as_json):
        raise UsageError("--html, --markdown, --numbers: more than one", remedy="give one; --json goes with the others")
    from basiscli.checkpoints.files import REPORT
    from basiscli.commands.report.api import report

    if options.numbers and options.folder == "." and not Path(REPORT).exists():
        _show_known(out)
        return
    page = report(options.folder, evaluations=options.evaluations)
    if options.numbers:
        _show_numbers(out, page)
    elif options.markdown:
        out.line(page.markdown())
    elif as_json and options.html is None:
        out.result(json.loads(page.report.model_dump_json()), lambda: None)
    else:
        written = page.write_html(options.html)
        out.result({"output": str(written)}, lambda: out.line(str(written)))


def _show_numbers(out: Output, page: ReportPage) -> None:
    document = {one.name: {"value": one.value, "meaning": one.meaning} for one in page.numbers}
    rows = [[one.name, f"{one.value:.10g}", one.meaning] for one in page.numbers]
    out.result(document, lambda: out.table(["number", "value", "meaning"], rows, right=[1]))


def _show_known(out: Output) -> None:
    from basiscli.reports.numbers import documented

    known = list(documented())
    out.result({name: {"meaning": meaning} for name, meaning in known}, lambda: out.table(["number", "meaning"], known))
