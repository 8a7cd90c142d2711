"""Sums of task vectors: weighted, or with sign election (Yadav et al., 'TIES-Merging', arXiv 2306.01708).

All tensors of a call have one shape and dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_NOTHING = 1e-8  # a sum of weights below this divides nothing


def weighted_sum(task_vectors: Sequence[Tensor], weights: Sequence[float], *, normalize: bool) -> Tensor:
    """Return Σ wᵢ Tᵢ, with `normalize` divided by Σ wᵢ unless that is near zero. Overwrites the first task vector."""
    total = task_vectors[0].mul_(weights[0])
    for task_vector, weight in zip(task_vectors[1:], weights[1:], strict=True):
        total.add_(task_vector, alpha=weight)
    divisor = sum(weights)
    return total.div_(divisor) if normalize and abs(divisor) >= _NOTHING else total


def elected_sum(task_vectors: Sequence[Tensor], weights: Sequence[float], *, normalize: bool) -> Tensor:
    """Return, element by element, the sum of those wᵢ Tᵢ whose sign is that of Σ wᵢ Tᵢ.

    With `normalize`, each element is divided by the weights of the models that it was summed over (the disjoint mean).
    Overwrites the task vectors.
    """
    weighted = [t.mul_(w) if w != 1 else t for t, w in zip(task_vectors, weights, strict=True)]
    majority = keep_majority(weighted)
    total = sum_of(weighted)
    if normalize:
        divisor = elected_weights(weighted, weights)
        if min(weights) > 0:
            divisor.clamp_(min=min(weights))  # where no model counts; the same as below, and several times faster
        else:
            divisor.masked_fill_(divisor == 0, 1)
        total.div_(divisor)
    return total.mul_(majority)


def keep_majority(task_vectors: Sequence[Tensor]) -> Tensor:
    """Return the elected sign (±1) of each element: that of the sum, + where it is zero.

    Overwrites each task vector by its magnitudes where it has that sign, and by zero elsewhere.
    """
    majority = sum_of(task_vectors).ge_(0).mul_(2).sub_(1)
    for task_vector in task_vectors:
        task_vector.mul_(majority).clamp_(min=0)
    return majority


def elected_weights(kept: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return for each element the sum of the weights of those tensors of `keep_majority` that are not zero there."""
    divisor = torch.zeros_like(kept[0])
    for task_vector, weight in zip(kept, weights, strict=True):
        divisor.add_(task_vector.sign(), alpha=weight)
    return divisor


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum in a new tensor."""
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total.add_(tensor)
    return total


def variance(tensors: Sequence[Tensor]) -> Tensor:
    """Return the variance over the tensors, element by element (divided by their number), in a new tensor."""
    mean = sum_of(tensors).div_(len(tensors))
    total = torch.zeros_like(mean)
    for tensor in tensors:
        difference = tensor - mean
        total.addcmul_(difference, difference)
    return total.div_(len(tensors))
