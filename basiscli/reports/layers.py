"""From numbers of tensors or modules, by their names, to a grid of layers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Literal

from basiscli.model.architecture import layer_of
from basiscli.names import natural_key
from basiscli.reports.blocks import HeatMap

OUTSIDE = "outside"
_MOST_ROWS, _MOST_COLUMNS = 40, 200
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.\d+\.")


def place_of(name: str) -> tuple[str, str, int | None]:
    """Return where a tensor or module stands: what comes before the layers, its name in one, and the layer's number.

    `model.layers.3.mlp.up_proj.weight` is `("model", "mlp.up_proj", 3)`; what is in no layer has no number, `None`.
    Experts of a layer share a name: `mlp.experts.*.up_proj`.
    """
    stem = name.removesuffix(".weight")
    layer = layer_of(f"{stem}.")
    if layer is None:
        return "", stem, None
    before, inside = _LAYER.split(f"{stem}.", maxsplit=1)
    return before, re.sub(r"(experts?)\.\d+(?=\.)", r"\1.*", inside).strip(".") or stem, layer


def layer_grid(
    values: Mapping[str, float],
    caption: str,
    measure: str,
    *,
    form: str = ".3g",
    scale: Literal["sequential", "diverging"] = "sequential",
) -> HeatMap | None:
    """Return a heat map, layers from left to right, one row for each kind of module; None where nothing is finite.

    Several numbers at one place (experts) become their mean. What is in no layer has a column of its own.

    Args:
        values: a number for each tensor or module, by name.
        caption: what the map shows.
        measure: what the numbers are, with their unit.
        form: how one is written, as `format` takes it.
        scale: colours from zero on, or to both sides of it.
    """
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    places = {name: place_of(name) for name in sorted(finite, key=natural_key)}
    towers = len({before for before, _, layer in places.values() if layer is not None}) > 1
    cells: dict[tuple[str, int | None], list[float]] = {}
    for name, (before, row, layer) in places.items():
        cells.setdefault((f"{before}: {row}" if towers and before else row, layer), []).append(finite[name])
    if not cells:
        return None
    rows = list(dict.fromkeys(row for row, layer in sorted(cells, key=lambda cell: cell[1] is None)))
    numbers = sorted({layer for _, layer in cells if layer is not None})[:_MOST_COLUMNS]
    columns: list[int | None] = [*numbers, *([None] if any(layer is None for _, layer in cells) else [])]
    means = {place: sum(found) / len(found) for place, found in cells.items()}
    return HeatMap(
        caption,
        tuple(rows[:_MOST_ROWS]),
        tuple(OUTSIDE if layer is None else str(layer) for layer in columns),
        tuple(tuple(means.get((row, layer)) for layer in columns) for row in rows[:_MOST_ROWS]),
        measure,
        form=form,
        scale=scale,
        left_out=max(0, len(rows) - _MOST_ROWS),
    )
