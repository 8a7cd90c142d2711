"""What sums of sparsified task vectors share: continuing one with `--onto`, which sparsifies the new models only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from basiscli import UsageError, per_model

if TYPE_CHECKING:
    from basiscli import Choices, History


def onto_weight(history: History) -> float:
    """Return what multiplies an earlier result's task vector to give back its sum."""
    return 1.0 / float(history.parameters["lambda"])


def check_onto(choices: Choices) -> None:
    """Refuse to continue a mean: a sum can be added to, and what it was divided by is another number than its scale.

    Raises:
        UsageError: `normalize`, now or in the earlier merge.
    """
    history = choices.history
    if history is not None and (choices.values["normalize"] or history.parameters["normalize"]):
        raise UsageError(
            f"{choices.method} with normalize=true cannot be continued with --onto", remedy="merge all models at once"
        )


def each(value: float | list[float], models: int, earlier: int) -> list[float]:
    """Return one number a model, and 1 (nothing is dropped) for the sum of an earlier merge, which comes first."""
    continued = int(earlier > 0)
    return [1.0] * continued + per_model(value, models - continued)


def first_number(earlier: int) -> int:
    """Return the number of the first of the models, counted over all merges: each draws random numbers of its own.

    The first place of a continued merge is its last model's; that one draws nothing again.
    """
    return max(0, earlier - 1)
