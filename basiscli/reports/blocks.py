"""What a section of a report is made of, as plain data: HTML, Markdown and pictures are made from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Notes:
    """What a reader should know, one remark a line."""

    lines: tuple[str, ...]


@dataclass(frozen=True)
class Tiles:
    """A few numbers that are shown large: (label, value) of each."""

    tiles: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Code:
    """A command or a few lines of code."""

    text: str
    language: str = "sh"


@dataclass(frozen=True)
class Table:
    """Rows of text under named columns."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str
    right: frozenset[int] = frozenset()
    """Columns of numbers, by their place."""
    code: frozenset[int] = frozenset()
    """Columns of names and digests."""
    folded: bool = False
    """Whether it is long and shown only when asked for."""


@dataclass(frozen=True)
class HeatMap:
    """A grid of numbers that are shown as colours."""

    caption: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    """By row and column; None where there is no number."""
    measure: str
    """What the numbers are, beside the colours."""
    across: str = "layer"
    """What the columns are."""
    form: str = ".3g"
    """How a number is written, as `format` takes it."""
    scale: Literal["sequential", "diverging"] = "sequential"
    """From zero on, or to both sides of it."""
    left_out: int = 0
    """Rows that were too many to show."""


@dataclass(frozen=True)
class Series:
    """One line of a chart: its name in the legend, and as many x as y."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class Curves:
    """A line chart."""

    caption: str
    across: str
    """What the horizontal axis shows, with its unit."""
    up: str
    """What the vertical axis shows, with its unit."""
    series: tuple[Series, ...]
    log: bool = False
    """Whether the vertical axis is logarithmic; only where all values are positive."""


Figure = HeatMap | Curves
Block = Text | Notes | Tiles | Code | Table | HeatMap | Curves


@dataclass(frozen=True)
class Section:
    """A part of a report under a heading."""

    key: str
    """Its anchor in the page, the same in every report: `task-vectors`."""
    title: str
    blocks: tuple[Block, ...]


def shown(figure: HeatMap, value: float) -> str:
    """Return a number of a heat map as it is written in its cell: by the map's `form`, zero without a sign."""
    text = f"{value:{figure.form}}"
    return text.lstrip("-") if float(text) == 0 else text


def described(figure: Figure) -> str:
    """Return the alternative text of a figure: what is measured, and where its ends are."""
    if isinstance(figure, Curves):
        parts = [
            f"{one.name} from {one.y[0]:.4g} at {one.x[0]:.4g} to {one.y[-1]:.4g} at {one.x[-1]:.4g}"
            for one in figure.series
        ]
        return f"{figure.up} by {figure.across}: {'; '.join(parts)}."
    cells = cells_of(figure)
    what = f"{figure.measure} for {len(figure.rows)} rows and {len(figure.columns)} columns ({figure.across})"
    if not cells:
        return f"{what}: none."
    least, most = min(cells), max(cells)
    return f"{what}: from {_at(figure, *least)} to {_at(figure, *most)}."


def cells_of(figure: HeatMap) -> list[tuple[float, int, int]]:
    """Return (value, row, column) of every cell of a heat map that has a number."""
    return [(value, y, x) for y, line in enumerate(figure.values) for x, value in enumerate(line) if value is not None]


def table_of(
    caption: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: set[int] | None = None,
    code: set[int] | None = None,
    folded: bool = False,
) -> Table:
    """Return a table without the columns that are empty in every row.

    Args:
        caption: what the rows are.
        columns: names, all of them.
        rows: as many cells each as there are columns.
        right: places in `columns` of numbers.
        code: places in `columns` of names and digests.
        folded: whether it is long and shown only when asked for.
    """
    kept = [n for n in range(len(columns)) if n == 0 or any(row[n] for row in rows)]
    numbers, names = (frozenset(kept.index(n) for n in which or () if n in kept) for which in (right, code))
    return Table(
        tuple(columns[n] for n in kept),
        tuple(tuple(row[n] for n in kept) for row in rows),
        caption,
        numbers,
        names,
        folded,
    )


def as_table(figure: Figure) -> Table:
    """Return a figure as a table: least, mean and most of each row of a heat map, or the points of each curve."""
    if isinstance(figure, Curves):
        points = [(one.name, x, y) for one in figure.series for x, y in zip(one.x, one.y, strict=True)]
        rows = tuple((name, f"{x:.6g}", f"{y:.6g}") for name, x, y in points)
        return Table(("", figure.across, figure.up), rows, figure.caption, frozenset({1, 2}))
    found = []
    for row, line in zip(figure.rows, figure.values, strict=True):
        numbers = [(value, x) for x, value in enumerate(line) if value is not None]
        if numbers:
            mean = sum(value for value, _ in numbers) / len(numbers)
            ends = [f"{shown(figure, value)} ({figure.columns[x]})" for value, x in (min(numbers), max(numbers))]
            found.append((row, str(len(numbers)), ends[0], f"{mean:.4g}", ends[1]))
    columns = ("", "count", f"least ({figure.across})", "mean", f"most ({figure.across})")
    return Table(columns, tuple(found), figure.caption, frozenset({1, 2, 3, 4}), frozenset({0}))


def matrix_table(figure: HeatMap) -> Table:
    """Return a heat map as a table of all its numbers, which is fit for few columns."""
    rows = tuple(
        (row, *("" if value is None else shown(figure, value) for value in line))
        for row, line in zip(figure.rows, figure.values, strict=True)
    )
    numbers = frozenset(range(1, len(figure.columns) + 1))
    return Table(("", *figure.columns), rows, figure.caption, numbers)


def _at(figure: HeatMap, value: float, row: int, column: int) -> str:
    return f"{shown(figure, value)} ({figure.rows[row]}, {figure.columns[column]})"
