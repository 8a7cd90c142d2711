"""DELLA without an election of signs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from basis_plugins.merge.della import check_probabilities, samplers
from basis_plugins.merge.parameters import Density, Epsilon, Lambda, Normalize, Rescale
from basis_plugins.merge.sums import check_onto, onto_weight
from basiscli import Choices, transform

if TYPE_CHECKING:
    from torch import Tensor

    from basiscli.linalg.sparsify import Sparsifier


def _check(choices: Choices) -> None:
    check_probabilities(choices)
    check_onto(choices)


@transform(
    "merge",
    rowwise=True,
    measure=samplers,
    check=_check,
    onto_weight=onto_weight,
    source="Deep et al., 'DELLA-Merging', arXiv 2406.11617",
)
def della_linear(
    base: Tensor,
    others: list[Tensor],
    weights: list[float],
    start: int,
    measured: list[Sparsifier],
    *,
    density: Density = 1.0,
    epsilon: Epsilon = 0.15,
    normalize: Normalize = False,
    rescale: Rescale = True,
    lambda_: Lambda = 1.0,
) -> Tensor:
    """Drop elements at random, the small ones of a row rather, and add up: W + λ Σ wᵢ Tᵢ.

    As `della`, with all models counting at every place.
    """
    from basiscli.linalg.consensus import weighted_sum

    kept = [sample(other - base, start) for other, sample in zip(others, measured, strict=True)]
    return weighted_sum(kept, weights, normalize=normalize).mul_(lambda_).add_(base)
