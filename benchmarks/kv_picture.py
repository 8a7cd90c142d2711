"""The picture of results/kv_quality.json: `python benchmarks/kv_picture.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "kv_quality.svg"
_COLOURS = {"pca": "#999999", "attention": "#56b4e9", "trained": "#d55e00"}  # told apart in all kinds of colour vision


def draw(table: dict[str, Any]) -> None:
    """Draw perplexity and accuracy against the removed share."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "basis"  # the same figures give the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, key, label in zip(axes, ("perplexity", "accuracy"), ("perplexity", "next-token accuracy"), strict=True):
        for bases, colour in _COLOURS.items():
            for search, line in (("uniform", "--"), ("greedy", "-")):
                rows = [row for row in table["rows"] if row["bases"] == bases and row["search"] == search]
                if rows:
                    shares = [0.0, *(100 * row["removed"] for row in rows)]
                    values = [table["dense"][key], *(row[key] for row in rows)]
                    axis.plot(shares, values, line, color=colour, marker="o", markersize=3, label=f"{bases}, {search}")
        axis.axhline(table["dense"][key], color="black", linewidth=0.6)
        axis.set_xlabel("removed share of the KV cache, %")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[0].legend(fontsize=8)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    draw(json.loads((Path(__file__).parent / "results" / "kv_quality.json").read_text()))
