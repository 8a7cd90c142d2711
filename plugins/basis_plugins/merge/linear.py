"""Weighted average."""

from __future__ import annotations

from typing import TYPE_CHECKING

from basiscli import History, transform

if TYPE_CHECKING:
    from torch import Tensor


def _onto_weight(history: History) -> float:
    # An average of n models counts n times when the next one joins; an unnormalised sum stands for itself.
    return sum(history.weights) if history.parameters["normalize"] else 1.0


@transform(
    "merge",
    elementwise=True,
    onto_weight=_onto_weight,
    source="Wortsman et al., 'Model soups', arXiv 2203.05482",
)
def linear(others: list[Tensor], weights: list[float], *, normalize: bool = True) -> Tensor:
    """Weighted average of the models: Σ wᵢ Wᵢ / Σ wᵢ.

    The plain choice for fine-tunes of one base that ended close to each other. `normalize=false` leaves out the
    division.
    """
    if normalize:
        weights = [weight / sum(weights) for weight in weights]
    merged = others[0] * weights[0]
    for other, weight in zip(others[1:], weights[1:], strict=True):
        merged.add_(other, alpha=weight)
    return merged
