"""A report's sections in Markdown, for model cards and terminals: tables stand where HTML has pictures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from basiscli.names import printable
from basiscli.reports.blocks import (
    Block,
    Code,
    Curves,
    Figure,
    HeatMap,
    Notes,
    Section,
    Table,
    Text,
    Tiles,
    as_table,
    matrix_table,
)

_WIDEST = 8  # columns of a grid that is written out


def markdown(sections: Iterable[Section], pictures: Mapping[Figure, str] | None = None) -> str:
    """Return sections as Markdown, each under a heading of the second level.

    Args:
        sections: what to write.
        pictures: the file that shows a figure, relative to the document; others are shown as tables.
    """
    shown = pictures or {}
    return "\n".join(
        f"## {plain(section.title)}\n\n" + "\n".join(block_text(block, shown) for block in section.blocks)
        for section in sections
    )


def block_text(block: Block, pictures: Mapping[Figure, str]) -> str:
    """Return one block of a section as Markdown, with the line break that ends it."""
    match block:
        case Text(text):
            return f"{plain(text)}\n"
        case Notes(lines):
            return "".join(f"- {plain(line)}\n" for line in lines)
        case Tiles(tiles):
            return _table(["", ""], [[plain(label), plain(value)] for label, value in tiles], {1})
        case Code(text, language):
            fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
            return f"{fence}{language}\n{printable(text)}\n{fence}\n"
        case Table():
            return _folded(block) if block.folded else _with_caption(block)
        case HeatMap() | Curves():
            picture = f"![{plain(block.caption)}]({pictures[block]})\n\n" if block in pictures else ""
            if isinstance(block, HeatMap) and block.across != "layer" and len(block.columns) <= _WIDEST:
                return picture + _with_caption(matrix_table(block))
            return picture + _folded(_thinned(as_table(block)))


def plain(text: str) -> str:
    """Return text escaped for Markdown, in one line: it makes no links, no markup, no HTML of somebody else's."""
    line = " ".join(printable(text).split())
    line = re.sub(r"([\\`*\[\]<>|&]|~~)", r"\\\1", line)
    line = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", line)  # within a word it is no markup
    return re.sub(r"^(#|[-+](?= )|\d+(?=[.)] ))", r"\\\1", line)


def span(text: str) -> str:
    """Return a name or a number as inline code, fit for a table's cell."""
    line = " ".join(printable(text).split())
    return plain(text) if not line or "`" in line else "`" + line.replace("|", r"\|") + "`"


def _with_caption(table: Table) -> str:
    return f"{plain(table.caption)}:\n\n{_rows(table)}"


def _folded(table: Table) -> str:
    """Return a table that readers open if they want it."""
    return (
        f"<details><summary>{escape(printable(table.caption), quote=False)}</summary>\n\n{_rows(table)}\n</details>\n"
    )


def _rows(table: Table) -> str:
    rows = [[span(cell) if n in table.code else plain(cell) for n, cell in enumerate(row)] for row in table.rows]
    return _table([plain(name) for name in table.columns], rows, table.right)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Iterable[int]) -> str:
    lines = [
        "| " + " | ".join(columns) + " |",
        "|" + "|".join("--:" if n in set(right) else "---" for n in range(len(columns))) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _thinned(table: Table, most: int = 24) -> Table:
    """Return a table of a curve's points with no more rows than a card should have, first and last among them."""
    if len(table.rows) <= most:
        return table
    places = {round(n * (len(table.rows) - 1) / (most - 1)) for n in range(most)}
    rows = tuple(row for n, row in enumerate(table.rows) if n in places)
    return Table(table.columns, rows, table.caption, table.right, table.code)
