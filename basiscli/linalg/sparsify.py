"""Sparsification of task vectors: by magnitude, without outliers, at random, and with rescaling.

    sparsifiers = trims(blocks, densities)  # one per model
    for block in blocks:
        sparse = [s(t, block.start) for s, t in zip(sparsifiers, block.task_vectors, strict=True)]

A sparsifier sets elements to zero and never reads beyond its block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from basiscli.linalg.random_mask import bernoulli, bernoulli_each
from basiscli.linalg.selection import NOTHING, Cut, largest

if TYPE_CHECKING:
    from basiscli.transforms import Blocks

Sparsifier = Callable[[Tensor, int], Tensor]
"""From a block of one model's task vector, and the flat index of its first element, to a new one with zeros in it."""


def keep_all(task_vector: Tensor, start: int) -> Tensor:
    """Return the block as it is."""
    return task_vector


def keep_none(task_vector: Tensor, start: int) -> Tensor:
    """Return zeros."""
    return torch.zeros_like(task_vector)


def trims(blocks: Blocks, densities: Sequence[float]) -> list[Sparsifier]:
    """Return a sparsifier per model that keeps its share `density` of elements of largest magnitude.

    At least one element stays where the density is above zero.
    """
    count = blocks.count
    wanted = [[] if d >= 1 or d <= 0 else [max(1, int(d * count))] for d in densities]
    cuts = largest(lambda: _magnitudes(blocks), wanted) if count else [[] for _ in densities]
    return [
        cut[0].keep if cut else keep_none if density <= 0 else keep_all
        for cut, density in zip(cuts, densities, strict=True)
    ]


def trims_without_outliers(blocks: Blocks, densities: Sequence[float], gammas: Sequence[float]) -> list[Sparsifier]:
    """Return a sparsifier per model that drops its share `gamma` of largest elements and keeps the next `density`.

    Where both together are more than the tensor has, fewer outliers are dropped. A density of 1 drops nothing.
    """
    count = blocks.count
    wanted: list[list[int]] = []
    for density, gamma in zip(densities, gammas, strict=True):
        kept = int(density * count)
        dropped = min(int(gamma * count), count - kept)
        wanted.append([] if density >= 1 else [dropped, dropped + kept])
    cuts = largest(lambda: _magnitudes(blocks), wanted) if count else [[] for _ in densities]
    return [_between(*pair) if pair else keep_all for pair in cuts]


def random_drops(densities: Sequence[float], seed: int, first: int, *, rescale: bool) -> list[Sparsifier]:
    """Return a sparsifier per model that keeps each element with probability `density`, scaled by 1/density if wanted.

    Args:
        densities: one per model.
        seed: of the tensor.
        first: index of the first model; each has its own random stream.
        rescale: whether to scale by 1/density.
    """
    return [_dropped(density, seed, first + index, rescale=rescale) for index, density in enumerate(densities)]


def magnitude_sampled(densities: Sequence[float], epsilons: Sequence[float], seed: int, first: int) -> list[Sparsifier]:
    """Return a sparsifier per model that keeps elements at random, larger ones of a row with higher probability.

    The probability rises linearly with the magnitude's rank in its row, from density − ε to density + ε. A row is all
    that has one index in the first dimension; a tensor of one dimension is one row.
    """
    return [
        _row_sampled(density, epsilon, seed, stream)
        for stream, (density, epsilon) in enumerate(zip(densities, epsilons, strict=True), start=first)
    ]


def rescaled(blocks: Blocks, sparsifiers: Sequence[Sparsifier]) -> list[Sparsifier]:
    """Return the sparsifiers scaled so that each model's Σ|·| over the tensor is that of its task vector."""
    before, after = [0.0] * len(sparsifiers), [0.0] * len(sparsifiers)
    if any(sparsify is not keep_all for sparsify in sparsifiers):
        for block in blocks:
            for number, (task_vector, sparsify) in enumerate(zip(block.task_vectors, sparsifiers, strict=True)):
                before[number] += float(task_vector.abs().sum(dtype=torch.float64))
                after[number] += float(sparsify(task_vector, block.start).abs().sum(dtype=torch.float64))
    tiny = 1e-7  # of noise alone: nothing to give back
    return [
        sparsify if sparsify is keep_all or min(b, a) < tiny else _times(sparsify, b / a)
        for sparsify, b, a in zip(sparsifiers, before, after, strict=True)
    ]


def row_ranks(magnitudes: Tensor) -> Tensor:
    """Return each element's rank in its row, 0 for the smallest, ties by column. Float32 [rows, columns].

    Sorting integers that hold the bits of the magnitude and below them the column is several times faster than an
    argsort, and equal magnitudes get the same order everywhere.
    """
    rows, columns = magnitudes.shape
    place = torch.arange(columns, device=magnitudes.device)
    keys = magnitudes.float().view(torch.int32).long().bitwise_left_shift_(32).bitwise_or_(place)
    ordered = torch.from_numpy(np.sort(keys.numpy(), axis=1)) if keys.device.type == "cpu" else keys.sort(dim=1).values
    order = ordered.bitwise_and_(0xFFFFFFFF)
    ranks = torch.empty(rows, columns, device=magnitudes.device)
    return ranks.scatter_(1, order, place.float().expand(rows, columns))


def _magnitudes(blocks: Blocks) -> Iterator[tuple[int, list[Tensor]]]:
    for block in blocks:
        yield block.start, [task_vector.abs_() for task_vector in block.task_vectors]


def _between(outliers: Cut, kept: Cut) -> Sparsifier:
    if outliers == NOTHING:
        return kept.keep
    return lambda task_vector, start: kept.keep(task_vector, start) - outliers.keep(task_vector, start)


def _dropped(density: float, seed: int, stream: int, *, rescale: bool) -> Sparsifier:
    if density >= 1:
        return keep_all
    if density <= 0:
        return keep_none
    factor = 1 / density if rescale else 1.0
    return lambda task_vector, start: bernoulli(task_vector, density, seed, stream, start).mul_(task_vector * factor)


def _row_sampled(density: float, epsilon: float, seed: int, stream: int) -> Sparsifier:
    if density >= 1:
        return keep_all
    if density <= 0:
        return keep_none

    def sparsify(task_vector: Tensor, start: int) -> Tensor:
        if task_vector.numel() == 0:
            return task_vector
        rows = task_vector.reshape(task_vector.shape[0] if task_vector.dim() > 1 else 1, -1)
        last = max(1, rows.shape[1] - 1)
        kept = row_ranks(rows.abs()).mul_(2 * epsilon / last).add_(density - epsilon)
        return bernoulli_each(kept, seed, stream, start).view(task_vector.shape).mul(task_vector)

    return sparsify


def _times(sparsify: Sparsifier, factor: float) -> Sparsifier:
    return lambda task_vector, start: sparsify(task_vector, start).mul_(factor)
