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
    """A report and the evaluations that are shown with it."""

    folder: Path
    report: Report
    evaluations: tuple[EvaluationRecord, ...] = ()

    @cached_property
    def sections(self) -> list[Section]:
        """What the report has to say: the same sections for every transform, as plain data."""
        from basiscli.reports.page import sections

        return sections(self.report, contributor_of(self.report), self.evaluations)

    @property
    def numbers(self) -> list[NamedNumber]:
        """The report's named numbers, and those of the first evaluation, with their meanings."""
        return named(self.report.numbers, *(one.numbers for one in self.evaluations[:1]))

    @property
    def default_file(self) -> Path:
        """Where the page is written if nothing else is said: beside the folder, which stays as it was verified."""
        return self.folder.with_name(f"{self.folder.name}-report.html")

    def html(self) -> str:
        """Return the page: one file without scripts that loads nothing."""
        from basiscli.reports.html import html

        return html(self.folder.name, self.report, self.sections)

    def markdown(self) -> str:
        """Return the same sections in Markdown, with tables in place of pictures."""
        from basiscli.reports.markdown import markdown, plain

        return f"# {plain(self.folder.name)}\n\n{markdown(self.sections)}"

    def write_html(self, file: str | Path | None = None) -> Path:
        """Write the page and return where it is; an earlier page is replaced, and nothing else.

        Raises:
            UsageError: there is another file of that name.
            ResourceError: it cannot be written.
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
    """Read what a run wrote about itself, to be shown.

    Args:
        folder: what `merge`, `compress`, `init` or `extract` made.
        evaluations: documents that `basis eval --json` printed: before and after, and, of results of several ratios,
            the curve of perplexity over ratio.

    Raises:
        InputError: there is no report, it is damaged, or an evaluation is none.
    """
    place = Path(folder).expanduser().resolve()
    if not place.is_dir():
        raise InputError("no such folder", file=place, remedy="give a folder that basis made")
    found = read_report(place)
    if found is None:
        raise InputError(
            f"there is no {REPORT} in this folder",
            file=place,
            remedy="give the output of a merge, compress, init or extract",
        )
    return ReportPage(place, found, tuple(read_evaluation(Path(file)) for file in evaluations))


def _is_page(file: Path) -> bool:
    from basiscli.reports.html import GENERATOR

    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return f'name="generator" content="{GENERATOR}"'.encode() in stream.read(1000)
