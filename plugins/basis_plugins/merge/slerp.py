"""Spherical interpolation of two models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from basis_plugins.merge.parameters import Interpolation
from basiscli import Blocks, transform

if TYPE_CHECKING:
    from torch import Tensor

COLLINEAR = 0.9995  # a cosine above which the arc is a line to four digits, and the sines lose theirs


def _coefficients(blocks: Blocks, t: Interpolation) -> list[float]:
    from basiscli.linalg.sphere import gram_of, slerp

    # Seen from zero, with or without a base.
    gram = gram_of(blocks.without_base())
    first, second = slerp(gram.diagonal().sqrt(), gram[0, 1], t, collinear=COLLINEAR)
    return [float(first), float(second)]


@transform(
    "merge",
    elementwise=True,
    measure=_coefficients,
    models=(2, 2),
    source="Shoemake, 'Animating rotation with quaternion curves', SIGGRAPH 1985",
)
def slerp(others: list[Tensor], measured: list[float], *, t: Interpolation) -> Tensor:
    """Interpolate along the arc from the first model (t = 0) to the second (t = 1), tensor by tensor.

    The angle is that between the two tensors as vectors. Nearly collinear ones are interpolated along the line. A
    `--base` changes nothing but the names and the report.
    """
    from basiscli.linalg.sphere import combination

    return combination(others, measured)
