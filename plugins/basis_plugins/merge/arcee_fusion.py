"""Arcee Fusion."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from basiscli import Blocks, transform

if TYPE_CHECKING:
    from torch import Tensor

_EPS = 1e-8


class _Measured(NamedTuple):
    divergence: dict[int, Tensor]
    """By the flat index of a block's first element: KL divergence of each of its rows, [rows, 1]."""
    threshold: float
    """Importance from which on an element of the second model is taken."""


def _importances(blocks: Blocks) -> _Measured:
    from basiscli.linalg.selection import largest

    divergence = {block.start: _divergence(*block.others) for block in blocks}

    def importances() -> Iterator[tuple[int, list[Tensor]]]:
        for block in blocks:
            first, second = block.others
            yield block.start, [_importance(first, second, divergence[block.start])]

    if blocks.count == 0:
        return _Measured(divergence, 0.0)
    # A quantile q is element number ⌊q (n − 1)⌋ in rising order.
    counts = [blocks.count - int(q * (blocks.count - 1)) for q in (0.25, 0.5, 0.75)]
    lower, median, upper = (cut.value for cut in largest(importances, [counts])[0])
    return _Measured(divergence, median + 1.5 * (upper - lower))


def _divergence(first: Tensor, second: Tensor) -> Tensor:
    """Return KL(softmax(second) ‖ softmax(first)) along the last dimension."""
    p, q = second.softmax(dim=-1).add_(_EPS), first.softmax(dim=-1).add_(_EPS)
    # Between equal rows rounding can make it a hair negative.
    return (p * (p / q).log_()).sum(dim=-1, keepdim=True).clamp_(min=0)


def _importance(first: Tensor, second: Tensor, divergence: Tensor) -> Tensor:
    return (second - first).abs_().mul_(divergence)


@transform("merge", rowwise=True, measure=_importances, models=(2, 2), source="Arcee Fusion, as in mergekit")
def arcee_fusion(others: list[Tensor], start: int, measured: _Measured) -> Tensor:
    """Take over from the second model the elements whose change matters most, and keep the first elsewhere.

    The importance of an element is |difference| times the Kullback-Leibler divergence between the two models' softmax
    of its row. Taken over is what lies at or above the tensor's median importance + 1.5 interquartile ranges. The
    quartiles are exact. A `--base` changes nothing but the names and the report.
    """
    first, second = others
    important = _importance(first, second, measured.divergence[start]) >= measured.threshold
    return (second - first).mul_(important).add_(first)
