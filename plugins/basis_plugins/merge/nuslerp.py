"""Spherical interpolation of two models or two task vectors, as a whole or in rows or columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from basiscli import Blocks, Choices, UsageError, transform

if TYPE_CHECKING:
    from torch import Tensor

RowWise = Annotated[bool, Field(description="vectors along the first dimension, unless flattened")]
Flatten = Annotated[bool, Field(description="the whole tensor is one vector")]

# A cosine beyond which two vectors are on one line: float32 sums give it to seven digits. Opposite ones have no arc
# between them, and for equal ones the line is the arc to those digits.
COLLINEAR = 1 - 1e-6

Coefficients = tuple["Tensor | float", "Tensor | float"]


def _check(choices: Choices) -> None:
    if abs(sum(choices.weights)) < 1e-6:
        raise UsageError("nuslerp divides by the sum of the weights, which is zero", remedy="other --weights")


def _coefficients(
    blocks: Blocks, weights: list[float], nuslerp_row_wise: RowWise, nuslerp_flatten: Flatten
) -> Coefficients | None:
    """Return what multiplies the two vectors; None where each row has vectors of its own, found row by row."""
    import torch

    from basiscli.linalg.sphere import gram_of

    if nuslerp_flatten or len(blocks.shape) < 2:
        gram = gram_of(blocks)
        first, second = _slerp(gram.diagonal().sqrt(), gram[0, 1], weights)
        return float(first), float(second)
    if not nuslerp_row_wise:
        return None
    squares, inner = None, torch.zeros(())
    for block in blocks:
        x, y = _vectors(block.base, block.others)
        found = torch.stack([(a.double() * b).sum(dim=0) for a, b in ((x, x), (y, y), (x, y))])
        squares = found if squares is None else squares.add_(found)
    assert squares is not None
    inner = squares[2]
    return _slerp(squares[:2].sqrt(), inner, weights)


def _slerp(lengths: Tensor, inner: Tensor, weights: list[float]) -> tuple[Tensor, Tensor]:
    from basiscli.linalg.sphere import slerp

    return slerp(lengths, inner, weights[1] / sum(weights), collinear=COLLINEAR)


def _vectors(base: Tensor | None, others: list[Tensor]) -> list[Tensor]:
    return others if base is None else [other - base for other in others]


@transform(
    "merge",
    rowwise=True,
    measure=_coefficients,
    check=_check,
    models=(2, 2),
    source="mergekit's NuSLERP; Shoemake, 'Animating rotation with quaternion curves', SIGGRAPH 1985",
)
def nuslerp(
    others: list[Tensor],
    weights: list[float],
    measured: Coefficients | None,
    base: Tensor | None = None,
    *,
    nuslerp_row_wise: RowWise = False,
    nuslerp_flatten: Flatten = True,
) -> Tensor:
    """Interpolate along the arc between two models, or with `--base` between their task vectors.

    The place on the arc is w₂ / (w₁ + w₂). With `nuslerp_flatten=false` the tensor is not one vector but many: along
    its last dimension, or along its first with `nuslerp_row_wise=true`.
    """
    import torch

    x, y = _vectors(base, others)
    if measured is None:
        lengths = torch.stack([v.double().norm(dim=-1, keepdim=True) for v in (x, y)])
        measured = _slerp(lengths, (x.double() * y).sum(dim=-1, keepdim=True), weights)
    first, second = (c.to(x.dtype) if isinstance(c, torch.Tensor) else c for c in measured)
    merged = (x * first).add_(y * second)
    return merged if base is None else merged.add_(base)
