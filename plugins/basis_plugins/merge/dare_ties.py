"""DARE with an election of signs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from basis_plugins.merge.parameters import Density, Lambda, Normalize, Rescale
from basiscli import per_model, transform

if TYPE_CHECKING:
    from torch import Tensor


@transform(
    "merge",
    elementwise=True,
    source="Yu et al., 'Language Models are Super Mario' (DARE), arXiv 2311.03099; signs as in TIES, arXiv 2306.01708",
)
def dare_ties(
    base: Tensor,
    others: list[Tensor],
    weights: list[float],
    seed: int,
    start: int,
    *,
    density: Density = 1.0,
    normalize: Normalize = False,
    rescale: Rescale = True,
    lambda_: Lambda = 1.0,
) -> Tensor:
    """Keep a random share of each task vector, multiply it with 1/density, and add those with the elected sign.

    As `dare_linear`, and at each place only the models with the sign of Σ wᵢ Tᵢ count.
    """
    from basiscli.linalg.consensus import elected_sum
    from basiscli.linalg.sparsify import random_drops

    drops = random_drops(per_model(density, len(others)), seed, 0, rescale=rescale)
    kept = [drop(other - base, start) for other, drop in zip(others, drops, strict=True)]
    return elected_sum(kept, weights, normalize=normalize).mul_(lambda_).add_(base)
