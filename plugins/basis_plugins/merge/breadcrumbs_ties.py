"""Model breadcrumbs with an election of signs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from basis_plugins.merge.breadcrumbs import trims
from basis_plugins.merge.parameters import Density, Gamma, Lambda, Normalize, Rescale
from basiscli import transform

if TYPE_CHECKING:
    from torch import Tensor

    from basiscli.linalg.sparsify import Sparsifier


@transform(
    "merge",
    elementwise=True,
    measure=trims,
    source="Davari & Belilovsky, 'Model Breadcrumbs', arXiv 2312.06795; signs as in TIES, arXiv 2306.01708",
)
def breadcrumbs_ties(
    base: Tensor,
    others: list[Tensor],
    weights: list[float],
    start: int,
    measured: list[Sparsifier],
    *,
    density: Density = 1.0,
    gamma: Gamma = 0.01,
    normalize: Normalize = False,
    rescale: Rescale = False,
    lambda_: Lambda = 1.0,
) -> Tensor:
    """Task vectors without their smallest elements and outliers, summed where their sign is the elected one.

    As `breadcrumbs`, and at each place only the models with the sign of Σ wᵢ Tᵢ count.
    """
    from basiscli.linalg.consensus import elected_sum

    trimmed = [trim(other - base, start) for other, trim in zip(others, measured, strict=True)]
    return elected_sum(trimmed, weights, normalize=normalize).mul_(lambda_).add_(base)
