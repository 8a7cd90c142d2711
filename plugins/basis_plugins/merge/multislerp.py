"""Mean direction of several models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from basiscli import Blocks, Choices, UsageError, transform

if TYPE_CHECKING:
    from torch import Tensor

NormalizeWeights = Annotated[bool, Field(description="divide the weights by their sum")]
Eps = Annotated[float, Field(gt=0, description="a length that counts as none")]


def _check(choices: Choices) -> None:
    if choices.values["normalize_weights"] and abs(sum(choices.weights)) < 1e-12 * sum(map(abs, choices.weights)):
        raise UsageError("the weights sum to zero and cannot be normalised", remedy="-p normalize_weights=false")


def _coefficients(blocks: Blocks, weights: list[float], normalize_weights: NormalizeWeights, eps: Eps) -> list[float]:
    from basiscli.linalg.sphere import direction_mean, gram_of

    divisor = sum(weights) if normalize_weights else 1.0
    return direction_mean(gram_of(blocks), [weight / divisor for weight in weights], eps=eps)


@transform(
    "merge",
    elementwise=True,
    measure=_coefficients,
    check=_check,
    models=(2, None),
    source="Goddard, 'MultiSLERP' (goddard.blog), as in mergekit",
)
def multislerp(
    others: list[Tensor],
    weights: list[float],
    measured: list[float],
    base: Tensor | None = None,
    *,
    normalize_weights: NormalizeWeights = True,
    eps: Eps = 1e-8,
) -> Tensor:
    """Take the weighted mean direction of the models, or with `--base` of their task vectors, at their mean length.

    The interpolation takes place in the tangent space at the mean direction Σ wᵢ uᵢ / ‖Σ wᵢ uᵢ‖. There the weighted sum
    of the tangent vectors is zero by construction, so that the point found is the mean direction itself, times
    Σ wᵢ ‖xᵢ‖. `karcher` finds the centre that is nearest to all along the sphere.
    """
    from basiscli.linalg.sphere import combination

    if base is None:
        return combination(others, measured)
    return combination([other - base for other in others], measured).add_(base)
