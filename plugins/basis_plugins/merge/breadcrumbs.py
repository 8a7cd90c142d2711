"""Model breadcrumbs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from basis_plugins.merge.parameters import Density, Gamma, Lambda, Normalize, Rescale
from basis_plugins.merge.sums import check_onto, each, onto_weight
from basiscli import Blocks, transform

if TYPE_CHECKING:
    from torch import Tensor

    from basiscli.linalg.sparsify import Sparsifier


def trims(
    blocks: Blocks, weights: list[float], earlier: int, density: Density, gamma: Gamma, rescale: Rescale
) -> list[Sparsifier]:
    """Return a sparsifier per model that drops its smallest elements and its outliers."""
    from basiscli.linalg.sparsify import rescaled, trims_without_outliers

    models = len(weights)
    found = trims_without_outliers(blocks, each(density, models, earlier), each(gamma, models, earlier))
    return rescaled(blocks, found) if rescale else found


@transform(
    "merge",
    elementwise=True,
    measure=trims,
    check=check_onto,
    onto_weight=onto_weight,
    source="Davari & Belilovsky, 'Model Breadcrumbs', arXiv 2312.06795",
)
def breadcrumbs(
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
    """Sum of task vectors without their smallest elements and without their outliers: W + λ Σ wᵢ Tᵢ.

    Of each task vector the share `gamma` of largest elements goes, and the share `density` next to them stays. A
    density of 1 keeps everything.
    """
    from basiscli.linalg.consensus import weighted_sum

    trimmed = [trim(other - base, start) for other, trim in zip(others, measured, strict=True)]
    return weighted_sum(trimmed, weights, normalize=normalize).mul_(lambda_).add_(base)
