"""What a recipe says of a merge: parameters by tensor, a tokenizer, a storage dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from basiscli.checkpoints.source import Source
from basiscli.checkpoints.views import Checkpoint

RECIPE = "recipe.yaml"
"""Name of the recipe that a merge was made by, in its result's folder."""

Choice = tuple[BaseModel, list[float]]
"""A method's parameters, and one weight a model."""


@dataclass(frozen=True)
class FromRecipe:
    """What a recipe says of a merge beyond one set of parameters for all tensors."""

    text: str
    """The file, as it goes into the result's folder."""
    choices: Callable[[str], Choice]
    """The parameters and weights of one tensor."""
    facts: Any
    """What decides the bytes of the result, as plain data for the fingerprint."""
    sources: list[tuple[Literal["base", "model"], Source]]
    """Every model and adapter that it names."""
    files: Mapping[str, bytes] | None
    """The tokenizer it asks for, in place of the reference's, and what depends on it."""
    dtype: str | None
    """The storage dtype it asks for."""
    opened: Sequence[Checkpoint]
    """The checkpoints that the models are parts of."""
