"""The part of a merge that only a recipe can ask for: parameters by tensor, a tokenizer, a storage dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from basiscli.checkpoints.source import Source
from basiscli.checkpoints.views import Checkpoint

RECIPE = "recipe.yaml"
"""Name of the recipe's copy in the output folder."""

Choice = tuple[BaseModel, list[float]]
"""A method's parameters, and one weight per model."""


@dataclass(frozen=True)
class FromRecipe:
    """A recipe's settings of a merge beyond one set of parameters for all tensors."""

    text: str
    """Text of the recipe, copied into the output folder."""
    choices: Callable[[str], Choice]
    """Returns the parameters and weights for a tensor, by its name."""
    facts: Any
    """All that the result's bytes depend on, as plain data for the plan's fingerprint."""
    sources: list[tuple[Literal["base", "model"], Source]]
    """Every model and adapter that the recipe names, with its role."""
    files: Mapping[str, bytes] | None
    """Files of the tokenizer that replaces the reference's, and files that name token ids; None to keep those."""
    dtype: str | None
    """Storage dtype of the output (`BF16`); None for the inputs'."""
    opened: Sequence[Checkpoint]
    """The checkpoints that the models' layers come from, to be closed with the plan."""
