"""A report as one HTML file: no network, no script, light and dark, on paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from basiscli.names import printable
from basiscli.reports.blocks import Curves, HeatMap, Section, as_table, matrix_table
from basiscli.reports.palette import FONT, style
from basiscli.reports.plots import svg
from basiscli.reports.schema import Report

GENERATOR = "basis report"
"""By which a file is known as one that may be written again."""
_WIDEST = 12


def html(title: str, report: Report, sections: Sequence[Section]) -> str:
    """Return a report as an HTML document, in one file that loads nothing.

    Args:
        title: what the result is called.
        report: of the run.
        sections: of the report, in order.
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("basiscli.reports"),
        autoescape=True,  # names come from files that a stranger made
        finalize=_shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    figures = [block for section in sections for block in section.blocks if isinstance(block, HeatMap | Curves)]
    pictures = {figure: Markup(svg(figure, f"f{n}")) for n, figure in enumerate(figures, start=1)}
    tables = {
        figure: matrix_table(figure)
        if isinstance(figure, HeatMap) and len(figure.columns) <= _WIDEST
        else as_table(figure)
        for figure in figures
    }
    page = environment.get_template("report.html.jinja")
    return page.render(
        title=title,
        generator=GENERATOR,
        report=report,
        sections=sections,
        pictures=pictures,
        tables=tables,
        colours=Markup(style()),
        font=Markup(FONT),
        kind=lambda block: type(block).__name__,
    )


def _shown(value: Any) -> Any:
    """Return what a template is about to write, without control characters."""
    return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value
