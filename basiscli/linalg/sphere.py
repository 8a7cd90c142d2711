"""Interpolation on the sphere, from inner products alone.

Every point that these methods visit is a combination Σ cᵢ xᵢ of the models, so that its lengths and angles follow from
the k×k matrix of the models' inner products: one pass over the tensors finds that, the rest is arithmetic on k numbers
in float64, and a second pass adds the models up. A `gram` is float64 [k, k] on the CPU; what is returned are
the coefficients cᵢ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from basiscli.linalg.lowrank import gram as inner_products

if TYPE_CHECKING:
    from basiscli.transforms import Blocks


def gram_of(blocks: Blocks) -> Tensor:
    """Return inner products of all models, or of their task vectors where there is a base: float64 [models, models]."""
    total: Tensor | None = None
    for block in blocks:
        origin = None if block.base is None else block.base.reshape(-1)
        part = inner_products([other.reshape(-1) for other in block.others], origin=origin)
        total = part if total is None else total.add_(part)
    assert total is not None  # a tensor has a block, if an empty one
    return total.cpu()


def combination(tensors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Return Σ cᵢ xᵢ in a new tensor."""
    total = tensors[0] * coefficients[0]
    for tensor, coefficient in zip(tensors[1:], coefficients[1:], strict=True):
        total.add_(tensor, alpha=coefficient)
    return total


def slerp(lengths: Tensor, inner: Tensor, t: float, *, collinear: float) -> tuple[Tensor, Tensor]:
    """Return the two coefficients of spherical interpolation from the first vector (t = 0) to the second (t = 1).

    They are those of the unit vectors, sin((1−t)θ)/sin θ and sin(tθ)/sin θ (Shoemake, 'Animating rotation with
    quaternion curves', 1985), and multiply the vectors as they are. Vectors of one direction are interpolated along the
    line; a vector of length 0 counts as orthogonal.

    Args:
        lengths: of the two vectors, float64 [2, …]: one pair, or many.
        inner: their inner products, float64 […].
        t: position between them, in [0, 1].
        collinear: absolute cosine from which on the interpolation is linear.
    """
    product = lengths[0] * lengths[1]
    cosine = torch.where(product > 0, inner / product.clamp(min=1e-300), 0.0).clamp(-1, 1)
    straight = cosine.abs() >= collinear
    theta = torch.where(straight, 0.5 * math.pi, cosine.acos())
    first = torch.where(straight, 1 - t, ((1 - t) * theta).sin() / theta.sin())
    second = torch.where(straight, t, (t * theta).sin() / theta.sin())
    return first, second


def direction_mean(gram: Tensor, weights: Sequence[float], *, eps: float = 1e-8) -> list[float]:
    """Return the coefficients of the vector of direction Σ wᵢ xᵢ/‖xᵢ‖ and length Σ wᵢ ‖xᵢ‖.

    Where the directions cancel (a sum shorter than `eps`), they are those of the plain sum Σ wᵢ xᵢ.
    """
    lengths = gram.diagonal().clamp(min=0).sqrt()
    given = torch.tensor(weights, dtype=torch.float64)
    direction = given / (lengths + eps)
    length = _length(gram, direction)
    if length < eps:
        return list(weights)
    scaled: list[float] = (direction * (float((given * lengths).sum()) / length)).tolist()
    return scaled


def karcher_mean(gram: Tensor, *, max_iter: int, tol: float) -> list[float]:
    """Return the coefficients of the Karcher mean of the directions, with the mean of the lengths.

    Fixed-point iteration in the tangent space: m ← Exp_m(mean of Log_m(uᵢ)). Vectors no longer than `tol` have no
    direction and count for the length only.
    """
    lengths = gram.diagonal().clamp(min=0).sqrt()
    count = len(lengths)
    has_direction = lengths > tol
    if not bool(has_direction.any()):
        return [0.0] * count
    to_unit = torch.where(has_direction, 1 / lengths, 0.0)
    units = gram * to_unit[:, None] * to_unit
    weights = has_direction / has_direction.sum().double()
    length = _length(units, weights)
    first = torch.zeros(count, dtype=torch.float64)
    first[int(has_direction.nonzero()[0])] = 1.0
    mean = first if length < tol else weights / length
    for _ in range(max_iter):
        cosines = (units @ mean).clamp(-1, 1)
        angles = cosines.acos()
        log = torch.where(angles < tol, 0.0, weights * angles / angles.sin().clamp(min=1e-300))
        tangent = log - float(log @ cosines) * mean
        length = _length(units, tangent)
        if length < tol:
            break
        mean = math.cos(length) * mean + math.sin(length) / length * tangent
        mean = mean / _length(units, mean)
    scaled: list[float] = (mean * to_unit * lengths.mean()).tolist()
    return scaled


def _length(gram: Tensor, coefficients: Tensor) -> float:
    return math.sqrt(max(0.0, float(coefficients @ gram @ coefficients)))
