"""Riemannian mean of several models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from basiscli import Blocks, transform

if TYPE_CHECKING:
    from torch import Tensor

Iterations = Annotated[int, Field(ge=0, description="steps of the fixed-point iteration, at most")]
Tolerance = Annotated[float, Field(gt=0, description="an angle or length that counts as none")]


def _coefficients(blocks: Blocks, max_iter: Iterations, tol: Tolerance) -> list[float]:
    from basiscli.linalg.sphere import gram_of, karcher_mean

    return karcher_mean(gram_of(blocks.without_base()), max_iter=max_iter, tol=tol)


@transform(
    "merge",
    elementwise=True,
    measure=_coefficients,
    source="Karcher, 'Riemannian center of mass and mollifier smoothing', CPAM 1977; arXiv 2603.04972",
)
def karcher(others: list[Tensor], measured: list[float], *, max_iter: Iterations = 10, tol: Tolerance = 1e-5) -> Tensor:
    """Find the centre of the models on the sphere: the direction with the least sum of squared angles to them.

    Every tensor counts as one vector; the result has the models' mean length. All models count equally. A `--base`
    changes nothing but the names and the report.
    """
    from basiscli.linalg.sphere import combination

    return combination(others, measured)
