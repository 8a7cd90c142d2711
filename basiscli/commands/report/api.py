"""A run's report as a page, as Markdown and as named numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from basiscli.checkpoints.files import REPORT
from basiscli.commands.report.contributors import contributor_of
from basiscli.errors import InputError, ResourceError, UsageError
from basiscli.reports.blocks import Section
from basiscli.reports.evaluations import EvaluationRecord, read_evaluation
from basiscli.reports.numbers import NamedNumber, named
from basiscli.reports.schema import Report, read_report


@dataclass(frozen=True)
class ReportPage:
    """A run's report with evaluations, as HTML, Markdown and numbers."""

    folder: Path
    report: Report
    evaluations: tuple[EvaluationRecord, ...] = ()

    @cached_property
    def sections(self) -> list[Section]:
        """The page's sections as plain data, with the same names for every command."""
        from basiscli.reports.page import sections

        return sections(self.report, contributor_of(self.report), self.evaluations)

    @property
    def numbers(self) -> list[NamedNumber]:
        """The report's named numbers, and those of the first evaluation, with their meanings."""
        return named(self.report.numbers, *(one.numbers for one in self.evaluations[:1]))

    @property
    def default_file(self) -> Path:
        """Default file of `write_html`: `FOLDER-report.html` beside the folder, which stays as it was verified."""
        return self.folder.with_name(f"{self.folder.name}-report.html")

    def html(self) -> str:
        """Return the page as HTML: self-contained, without scripts."""
        from basiscli.reports.html import html

        return html(self.folder.name, self.report, self.sections)

    def markdown(self) -> str:
        """Return the page as Markdown, with tables in place of pictures."""
        from basiscli.reports.markdown import markdown, plain

        return f"# {plain(self.folder.name)}\n\n{markdown(self.sections)}"

    def write_html(self, file: str | Path | None = None) -> Path:
        """Write the HTML page and return its path; only an earlier page of basis is replaced.

        Raises:
            UsageError: a file of that name exists and is not such a page.
            ResourceError: the file cannot be written.
        """
        target = Path(file) if file is not None else self.default_file
        try:
            if target.exists() and not _is_page(target):
                raise UsageError(
                    "there is something of that name that is no report",
                    file=target,
                    remedy="give another name with --html",
                )
            target.write_text(self.html(), encoding="utf-8")
        except OSError as error:
            raise ResourceError(
                f"cannot write: {error.strerror or error}", file=target, remedy="give another place with --html"
            ) from error
        return target


def report(folder: str | Path = ".", *, evaluations: Sequence[str | Path] = ()) -> ReportPage:
    """Return the report of a run, with evaluations, to be shown.

        basiscli.report("merged").write_html()

    Args:
        folder: the output of `merge`, `compress`, `init` or `extract`.
        evaluations: files of `basis eval --json`: before and after, or of several ratios for a curve of perplexity.

    Raises:
        InputError: there is no report, or a file is damaged or not an evaluation.
    """
    path = Path(folder).expanduser().resolve()
    if not path.is_dir():
        raise InputError("no such folder", file=path, remedy="give a folder that basis made")
    found = read_report(path)
    if found is None:
        raise InputError(
            f"there is no {REPORT} in this folder",
            file=path,
            remedy="give the output of a merge, compress, init or extract",
        )
    return ReportPage(path, found, tuple(read_evaluation(Path(file)) for file in evaluations))


def _is_page(file: Path) -> bool:
    from basiscli.reports.html import GENERATOR

    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return f'name="generator" content="{GENERATOR}"'.encode() in stream.read(1000)
