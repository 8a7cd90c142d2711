"""DELLA: drop by magnitude at random, with an election of signs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from basis_plugins.merge.parameters import Density, Epsilon, Lambda, Normalize, Rescale
from basis_plugins.merge.sums import each, first_number
from basiscli import Blocks, Choices, UsageError, per_model, transform

if TYPE_CHECKING:
    from torch import Tensor

    from basiscli.linalg.sparsify import Sparsifier


def samplers(
    blocks: Blocks,
    weights: list[float],
    seed: int,
    earlier: int,
    density: Density,
    epsilon: Epsilon,
    rescale: Rescale,
) -> list[Sparsifier]:
    """Return a sparsifier per model that drops elements at random, smaller ones with higher probability."""
    from basiscli.linalg.sparsify import magnitude_sampled, rescaled

    models = len(weights)
    densities, epsilons = each(density, models, earlier), each(epsilon, models, earlier)
    found = magnitude_sampled(densities, epsilons, seed, first_number(earlier))
    return rescaled(blocks, found) if rescale else found


def check_probabilities(choices: Choices) -> None:
    """Raise for densities and epsilons whose probabilities are not within 0 and 1.

    Raises:
        UsageError: for the first model with such a pair.
    """
    models = len(choices.weights) - (choices.history is not None)
    pairs = zip(*(per_model(choices.values[name], models) for name in ("density", "epsilon")), strict=True)
    for density, epsilon in pairs:
        if 0 < density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
            raise UsageError(
                f"{choices.method}: probabilities from density − epsilon to density + epsilon, "
                f"{density:g} ∓ {epsilon:g}, must lie between 0 and 1",
                remedy=f"-p epsilon=… below {min(density, 1 - density):g}",
            )


@transform(
    "merge",
    rowwise=True,
    measure=samplers,
    check=check_probabilities,
    source="Deep et al., 'DELLA-Merging', arXiv 2406.11617",
)
def della(
    base: Tensor,
    others: list[Tensor],
    weights: list[float],
    start: int,
    measured: list[Sparsifier],
    *,
    density: Density = 1.0,
    epsilon: Epsilon = 0.15,
    normalize: Normalize = True,
    rescale: Rescale = True,
    lambda_: Lambda = 1.0,
) -> Tensor:
    """Drop elements at random, the small ones of a row rather, elect signs and average the models that have them.

    An element stays with a probability that rises with the rank of its magnitude in its row, from density − ε to
    density + ε. What stays is multiplied so that Σ|Tᵢ| over the tensor is what it was. Otherwise as `ties`.
    """
    from basiscli.linalg.consensus import elected_sum

    kept = [sample(other - base, start) for other, sample in zip(others, measured, strict=True)]
    return elected_sum(kept, weights, normalize=normalize).mul_(lambda_).add_(base)
