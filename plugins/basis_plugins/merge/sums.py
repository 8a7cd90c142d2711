"""Shared by sums of sparsified task vectors: continuing one with `--onto`, which sparsifies the new models only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from basiscli import UsageError, per_model

if TYPE_CHECKING:
    from basiscli import Choices, History


def onto_weight(history: History) -> float:
    """Return the weight 1/λ by which an earlier result's task vector becomes the sum again."""
    return 1.0 / float(history.parameters["lambda"])


def check_onto(choices: Choices) -> None:
    """Raise for a mean, which cannot be continued: the number it was divided by is not its scale.

    Raises:
        UsageError: `normalize` is set, now or in the earlier merge.
    """
    history = choices.history
    if history is not None and (choices.values["normalize"] or history.parameters["normalize"]):
        raise UsageError(
            f"{choices.method} with normalize=true cannot be continued with --onto", remedy="merge all models at once"
        )


def each(value: float | list[float], models: int, earlier: int) -> list[float]:
    """Return one number per model, with 1 (nothing dropped) for the result of an earlier merge, which comes first."""
    continued = int(earlier > 0)
    return [1.0] * continued + per_model(value, models - continued)


def first_number(earlier: int) -> int:
    """Return the index of the first model over all merges, by which each has its own random stream.

    In a continued merge, index 0 is the earlier result, which takes the last earlier model's index and draws nothing.
    """
    return max(0, earlier - 1)
