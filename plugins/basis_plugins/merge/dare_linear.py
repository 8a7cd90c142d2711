"""DARE: drop and rescale, then add."""

from __future__ import annotations

from typing import TYPE_CHECKING

from basis_plugins.merge.parameters import Density, Lambda, Normalize, Rescale
from basis_plugins.merge.sums import check_onto, each, first_number, onto_weight
from basiscli import transform

if TYPE_CHECKING:
    from torch import Tensor


@transform(
    "merge",
    elementwise=True,
    check=check_onto,
    onto_weight=onto_weight,
    source="Yu et al., 'Language Models are Super Mario' (DARE), arXiv 2311.03099",
)
def dare_linear(
    base: Tensor,
    others: list[Tensor],
    weights: list[float],
    seed: int,
    start: int,
    earlier: int,
    *,
    density: Density = 1.0,
    normalize: Normalize = False,
    rescale: Rescale = True,
    lambda_: Lambda = 1.0,
) -> Tensor:
    """Keep a random share of each task vector, multiply it with 1/density, and add up: W + λ Σ wᵢ Tᵢ.

    The random numbers depend on `--seed`, the tensor's name and the model's number alone: the same bytes whatever the
    order of the work.
    """
    from basiscli.linalg.consensus import weighted_sum
    from basiscli.linalg.sparsify import random_drops

    drops = random_drops(each(density, len(others), earlier), seed, first_number(earlier), rescale=rescale)
    kept = [drop(other - base, start) for other, drop in zip(others, drops, strict=True)]
    return weighted_sum(kept, weights, normalize=normalize).mul_(lambda_).add_(base)
