"""Pictures of a report, as SVG: matplotlib draws them, the page's colours are put in afterwards.

Text stays text: it can be read aloud, searched and copied, and takes the page's font. Colours are variables, so that
the same picture is right on a light page, on a dark one and on paper.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import warnings
from typing import TYPE_CHECKING, Any

from markupsafe import escape

from basiscli.names import printable
from basiscli.reports.blocks import Curves, Figure, HeatMap, cells_of, described, shown
from basiscli.reports.palette import FONT, LEVELS, SERIES, stand_in, style, with_variables

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LONGEST = 34  # characters of a row's name
_SMALL = 7.5
_LEAST_DIVERGING = 0.2  # that the colours of small differences do not look like large ones
_ROW, _COLUMN = 0.27, 0.27  # inches


def svg(figure: Figure, key: str, *, alone: bool = False) -> str:
    """Return a figure as an SVG element, with its description for those who do not see it.

    Args:
        figure: what to draw.
        key: what its identifiers begin with; no two pictures of a page may share it.
        alone: whether it is a file of its own, which needs its own colours, or a part of a page that has them.
    """
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": key,  # the same numbers give the same file
        "text.parse_math": False,  # a name with $ is a name
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": _SMALL,
        "axes.linewidth": 0.6,
        "legend.frameon": False,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), stand_in("ink")),
        **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), stand_in("line")),
    }
    titles: dict[str, str] = {}
    out = io.StringIO()
    with warnings.catch_warnings(), matplotlib.rc_context(settings):
        # A name in another script: matplotlib's font lacks it and only guesses its width; the browser's has it.
        warnings.filterwarnings("ignore", message=".*Glyph .* missing")
        warnings.filterwarnings("ignore", message="constrained_layout not applied")  # names of very wide letters
        size = _size_of(figure)
        canvas = Canvas(figsize=size, layout="constrained")
        axes = canvas.add_subplot(facecolor="none")
        if isinstance(figure, HeatMap):
            titles = _heat_map(axes, figure)
        else:
            _curves(axes, figure)
        canvas.savefig(
            out, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    return _finished(out.getvalue(), figure, key, titles, alone=alone)


def _size_of(figure: Figure) -> tuple[float, float]:
    if isinstance(figure, Curves):
        return 6.4, 3.0
    names = max(min(len(row), _LONGEST) for row in figure.rows)
    own = max(_COLUMN, 0.075 * max(len(shown(figure, v)) for v, _, _ in cells_of(figure)) + 0.08)
    width = len(figure.columns) * (own if len(figure.columns) <= 14 else _COLUMN if len(figure.columns) <= 48 else 0.09)
    below = 0.07 * max((len(_shortened(name)) for name in figure.columns if _stands(figure, name)), default=0)
    return 1.1 + 0.075 * names + max(width, 1.6), 0.75 + below + _ROW * max(len(figure.rows), 2)


def _stands(figure: HeatMap, column: str) -> bool:
    """Return whether a column's name is too long to be written from left to right."""
    return len(column) > (8 if len(figure.columns) <= 4 else 4)


def _heat_map(axes: Axes, figure: HeatMap) -> dict[str, str]:
    """Draw a rectangle for each number; return what each says when it is pointed at, by its identifier."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.patches import Rectangle

    letter = "d" if figure.scale == "diverging" else "h"
    cells = cells_of(figure)
    top = max([_LEAST_DIVERGING if letter == "d" else 0.0, *(abs(value) for value, _, _ in cells)]) or 1.0
    low = -top if letter == "d" else min(0.0, min((value for value, _, _ in cells), default=0.0))
    written = len(figure.columns) <= (48 if all(shown(figure, v).isdigit() for v, _, _ in cells) else 14)
    titles: dict[str, str] = {}
    axes.add_patch(
        Rectangle((-0.5, -0.5), len(figure.columns), len(figure.rows), facecolor=stand_in("none"), lw=0, clip_on=False)
    )
    for value, y, x in cells:
        level = min(LEVELS - 1, int((value - low) / (top - low) * LEVELS))
        name = f"cell-{y}-{x}"
        titles[name] = f"{figure.rows[y]}, {figure.across} {figure.columns[x]}: {shown(figure, value)}"
        place = (x - 0.47, y - 0.46)
        colour = stand_in(f"{letter}{level}")
        axes.add_patch(Rectangle(place, 0.94, 0.92, facecolor=colour, lw=0, gid=name, clip_on=False))
        if written:
            axes.text(
                x, y, shown(figure, value), ha="center", va="center_baseline", fontsize=6.5,
                color=stand_in(f"{letter}{level}t"),
            )  # fmt: skip
    axes.set_xlim(-0.5, len(figure.columns) - 0.5)
    axes.set_ylim(len(figure.rows) - 0.5, -0.5)
    axes.set_yticks(range(len(figure.rows)), [_shortened(row) for row in figure.rows])
    every = max(1, math.ceil(len(figure.columns) / 48))
    axes.set_xticks(range(0, len(figure.columns), every), [_shortened(name) for name in figure.columns[::every]])
    for label, name in zip(axes.get_xticklabels(), figure.columns[::every], strict=True):
        label.set_rotation(90 if _stands(figure, name) else 0)
    axes.set_xlabel(figure.across)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    ramp = ListedColormap([stand_in(f"{letter}{level}") for level in range(LEVELS)])
    bar = axes.figure.colorbar(ScalarMappable(Normalize(low, top), ramp), ax=axes, pad=0.012, aspect=14, shrink=0.9)
    bar.set_label(figure.measure)
    bar.outline.set_visible(False)
    bar.ax.locator_params(nbins=4)
    return titles


def _curves(axes: Axes, figure: Curves) -> None:
    dashes = itertools.cycle(["-", "--", "-.", ":"])  # told apart without colours, too
    for number, (one, dash) in enumerate(zip(figure.series, dashes, strict=False)):
        marker = "o" if len(one.x) <= 16 else None
        colour = stand_in(f"s{number % SERIES}")
        axes.plot(one.x, one.y, dash, color=colour, lw=1.6, marker=marker, markersize=3.5, label=_shortened(one.name))
    axes.set_xlabel(figure.across)
    axes.set_ylabel(figure.up)
    axes.grid(lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=2)
    if figure.log:
        axes.set_yscale("log")
        _plain_ticks(axes, figure)
    if len(figure.series) > 1:
        axes.legend(fontsize=_SMALL)


def _plain_ticks(axes: Axes, figure: Curves) -> None:
    """Write 20, 50 and 100 on a logarithmic axis that spans less than two powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    values = [y for one in figure.series for y in one.y]
    if max(values) / min(values) < 100:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _finished(drawn: str, figure: Figure, key: str, titles: dict[str, str], *, alone: bool) -> str:
    """Return the picture without prolog, with its own identifiers, its description and the page's colours."""
    picture = re.sub(r"<!--.*?-->\s*", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
    picture = re.sub(r'(?<= d=")[^"]*', lambda match: re.sub(r"\.(\d\d)\d+|\s+", _short, match[0]), picture)
    # Text takes the font of its surroundings, and stands upright without being told so.
    picture = re.sub(r" font-family: [^;\"]*;| transform=\"rotate\(-0 [^)]*\)\"", "", picture)
    picture = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{key}-", picture)
    for name, title in titles.items():
        mark = f'<g id="{key}-{name}">'
        picture = picture.replace(mark, f"{mark}<title>{escape(title)}</title>", 1)
    label = f'role="img" aria-labelledby="{key}-title {key}-desc"'
    words = f'<title id="{key}-title">{escape(figure.caption)}</title>'
    words += f'<desc id="{key}-desc">{escape(described(figure))}</desc>'
    rules = f"<style>{style()}svg{{font-family:{FONT}}}</style>" if alone else ""
    picture = re.sub(r"<svg ([^>]*)>", lambda match: f"<svg {label} {match[1]}>{words}{rules}", picture, count=1)
    if not alone:  # HTML knows the namespaces
        picture = re.sub(r' xmlns(:xlink)?="[^"]*"', "", picture)
    return printable(with_variables(picture).strip()) + "\n"


def _short(part: re.Match[str]) -> str:
    """Return a hundredth of a point, all that a screen shows, of a longer number; a space of other white space."""
    return f".{part[1]}" if part[1] else " "


def _shortened(name: str) -> str:
    """Return a name that fits, its end kept: there it differs from its neighbours."""
    return name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}"
