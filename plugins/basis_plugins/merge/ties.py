"""TIES merging."""

from __future__ import annotations

from typing import TYPE_CHECKING

from basis_plugins.merge.parameters import Density, Lambda, Normalize, Rescale
from basiscli import Blocks, per_model, transform

if TYPE_CHECKING:
    from torch import Tensor

    from basiscli.linalg.sparsify import Sparsifier


def _trims(blocks: Blocks, weights: list[float], density: Density, rescale: Rescale) -> list[Sparsifier]:
    from basiscli.linalg.sparsify import rescaled, trims

    found = trims(blocks, per_model(density, len(weights)))
    return rescaled(blocks, found) if rescale else found


@transform(
    "merge",
    elementwise=True,
    measure=_trims,
    source="Yadav et al., 'TIES-Merging', arXiv 2306.01708",
)
def ties(
    base: Tensor,
    others: list[Tensor],
    weights: list[float],
    start: int,
    measured: list[Sparsifier],
    *,
    density: Density = 1.0,
    normalize: Normalize = True,
    rescale: Rescale = False,
    lambda_: Lambda = 1.0,
) -> Tensor:
    """Trim each task vector to its largest elements, elect a sign for each place, average the models that have it.

    W + λ Σ wᵢ Tᵢ / Σ wᵢ, over the models whose trimmed Tᵢ is not zero and has the sign of Σ wᵢ Tᵢ at that place. A
    density of 0.2 to 0.5 is usual. `rescale` gives each trimmed task vector the Σ|·| it had before.
    """
    from basiscli.linalg.consensus import elected_sum

    trimmed = [trim(other - base, start) for other, trim in zip(others, measured, strict=True)]
    return elected_sum(trimmed, weights, normalize=normalize).mul_(lambda_).add_(base)
