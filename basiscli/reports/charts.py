"""Pictures of a report, as SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping

from basiscli.checkpoints.architecture import layer_of
from basiscli.names import natural_key


def rank_chart(ranks: Mapping[str, int]) -> bytes:
    """Draw the rank of every module, layers from left to right, one row for each kind of module.

    Args:
        ranks: by module name (`model.layers.3.mlp.up_proj`).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = {name: (_row(name), layer_of(f"{name}.")) for name in ranks}
    rows = list(
        dict.fromkeys(row for row, _ in sorted(cells.values(), key=lambda cell: (cell[1] is None, cell[1] or 0)))
    )
    columns = sorted({layer for _, layer in cells.values() if layer is not None})
    outside = any(layer is None for _, layer in cells.values())
    grid = [[float("nan")] * (len(columns) + outside) for _ in rows]
    for name, (row, layer) in cells.items():
        grid[rows.index(row)][len(columns) if layer is None else columns.index(layer)] = ranks[name]
    # The same ranks give the same file; text stays text.
    with matplotlib.rc_context({"svg.hashsalt": "basis", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure, axis = pyplot.subplots(
            figsize=(2.2 + 0.26 * len(grid[0]), 0.9 + 0.28 * len(rows)), layout="constrained"
        )
        most = max(ranks.values())
        image = axis.imshow(grid, cmap="viridis", vmin=0, vmax=most, aspect="auto")
        for y, line in enumerate(grid):
            for x, rank in enumerate(line):
                if rank == rank:  # not NaN: the module is there
                    colour = "black" if rank > 0.6 * most else "white"
                    axis.text(x, y, f"{rank:.0f}", ha="center", va="center", fontsize=6, color=colour)
        axis.set_yticks(range(len(rows)), rows, fontsize=7)
        labels = [str(layer) for layer in columns] + ["outside"] * outside
        axis.set_xticks(range(len(labels)), labels, fontsize=6, rotation=90 if outside else 0)
        axis.set_xlabel("layer", fontsize=7)
        figure.colorbar(image, ax=axis, label="rank", pad=0.01)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Title": "Rank of every module by layer"})
        pyplot.close(figure)
    return out.getvalue().encode()


def _row(name: str) -> str:
    """Return a module's name within its layer."""
    return re.split(r"\.\d+\.", name, maxsplit=1)[-1]


def rank_table(ranks: Mapping[str, int], shares: Mapping[str, float]) -> list[tuple[str, int, int, float, int, float]]:
    """Return rows (module, how many, least, mean and most rank, mean share of energy) for each kind of module."""
    kinds: dict[str, list[str]] = {}
    for name in sorted(ranks, key=natural_key):
        kinds.setdefault(_row(name), []).append(name)
    found = []
    for row, names in kinds.items():
        own, held = [ranks[name] for name in names], [shares[name] for name in names]
        found.append((row, len(names), min(own), sum(own) / len(own), max(own), sum(held) / len(held)))
    return found
