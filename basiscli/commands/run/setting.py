"""Parameters whose value depends on the tensor: one value, a gradient over the layers, or values by filter."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

Scalar = bool | int | float | str


class Conditional(BaseModel):
    """A value for tensors whose names contain the filter; without a filter, or with `*`, for all."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: Scalar | list[Scalar]
    filter: str | None = None

    def applies(self, tensor: str) -> bool:
        """Return whether the value is for this tensor."""
        return self.filter is None or self.filter == "*" or self.filter in tensor


Setting = Scalar | list[Scalar] | Conditional | list[Conditional]
"""The forms of a parameter's value in a recipe."""


def value_at(setting: Setting, tensor: str, depth: float) -> Scalar | None:
    """Return a parameter's value for one tensor; None where no filter matches.

    Args:
        setting: as written.
        tensor: the tensor's name; the first filter that is part of it decides.
        depth: of the tensor's layer in its slice, from 0 (first) to 1 (last). A list of numbers is a gradient: its
            values lie at equal distances over the slice, with linear interpolation between them. Of a list of strings
            or booleans the one at or before the depth is taken.
    """
    if isinstance(setting, Conditional):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    steps = []
    for item in setting:
        if not isinstance(item, Conditional):
            steps.append(item)
        elif item.applies(tensor):
            return value_at(item.value, tensor, depth)
    return _along(steps, depth) if steps else None


def _along(steps: Sequence[Scalar], depth: float) -> Scalar:
    numbers = [_number(step) for step in steps]
    place = depth * (len(steps) - 1)
    before = int(place)
    if any(number is None for number in numbers):
        return steps[before]
    after, share = min(len(steps) - 1, before + 1), place - before
    low, high = numbers[before], numbers[after]
    assert low is not None and high is not None
    return (1 - share) * low + share * high


def _number(step: Scalar) -> float | None:
    """Return a number; YAML 1.1 reads `1e-5`, which has no point, as a word."""
    if isinstance(step, bool):
        return None
    try:
        return float(step)
    except ValueError:
        return None
