"""Parameters of the method and one weight per model for each tensor, from a mergekit recipe."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from basiscli.commands.merge.api import check_weights
from basiscli.commands.run.mergekit import IGNORED, MergekitRecipe, OutputSlice
from basiscli.commands.run.reading import in_recipe
from basiscli.commands.run.setting import Scalar, Setting, value_at
from basiscli.errors import InputError, UsageError, did_you_mean
from basiscli.model.architecture import is_before_layers, layer_of, with_layer
from basiscli.transforms import Choices, Method
from basiscli.transforms.per_model import is_per_model

_WEIGHT = "weight"
Settings = Mapping[str, Setting]


@dataclass(frozen=True)
class TensorParameters:
    """A function from a tensor's name to the method's parameters and weights; see `FromRecipe.choices`."""

    recipe: MergekitRecipe
    method: Method
    file: Path
    slices: Sequence[OutputSlice]
    """The recipe's slices, in the order of the result's layers."""
    order: Sequence[Sequence[int]]
    """For each slice, the indices of its sources in the order in which the method gets them."""
    _known: dict[tuple[Any, ...], tuple[BaseModel, list[float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = {*self.method.parameters.model_fields, *IGNORED}
        known |= {_WEIGHT} if "weights" in self.method.wants else set()
        for place, settings in self.written():
            for name in settings:
                if name not in known:
                    raise InputError(
                        f"{self.method.name} has no parameter '{name}' ({place}.{name})",
                        file=self.file,
                        remedy=did_you_mean(name, known - IGNORED),
                    )

    def __call__(self, name: str) -> tuple[BaseModel, list[float]]:
        """Return the parameters, and one weight per model, for a tensor of the result.

        Raises:
            InputError: a value that the method does not take, with its key in the recipe.
        """
        part, depth, offset = self._place(name)
        cut = self.slices[part]
        shared = [cut.parameters, self.recipe.part.parameters, self.recipe.parameters]
        sources = [cut.sources[place] for place in self.order[part]]
        own = [
            (name if offset is None else with_layer(name, source.layer_range[0] + offset), [source.parameters, *shared])
            for source in sources
        ]
        given: dict[str, Any] = {}
        for parameter, info in self.method.parameters.model_fields.items():
            value: Any = _found(parameter, name, depth, shared)
            if is_per_model(info):
                each = [_found(parameter, tensor, depth, settings) for tensor, settings in own]
                value = None
                if any(one is not None for one in each):
                    value = [info.get_default() if one is None else one for one in each]
            if value is not None:
                given[parameter] = value
        weights = [_found(_WEIGHT, tensor, depth, settings) for tensor, settings in own]
        return self._checked(given, [1.0 if weight is None else weight for weight in weights], name)

    @property
    def facts(self) -> Any:
        """All that the parameters depend on, as plain data for the fingerprint."""
        return [[part.model_dump(mode="json") for part in self.slices], self.recipe.model_dump(mode="json"), self.order]

    def _checked(self, given: dict[str, Any], weights: list[Any], name: str) -> tuple[BaseModel, list[float]]:
        key = (repr(sorted(given.items())), repr(weights))
        if key not in self._known:
            with in_recipe(self.file, f"of {name}"):
                numbers = [_finite(weight) for weight in weights]
                values = self.method.validate(given)
                if "base" not in self.method.wants:  # with one, weights of zero leave a tensor as the base has it
                    check_weights(self.method, values, numbers)
                if self.method.check is not None:
                    self.method.check(Choices(self.method.name, dict(values), numbers, None))
            self._known[key] = values, numbers
        return self._known[key]

    def _place(self, name: str) -> tuple[int, float, int | None]:
        """Return a tensor's slice, its depth in it from 0 to 1, and its layer's number in it."""
        layer = layer_of(name)
        if layer is None:  # before the layers, or after them
            return (0 if is_before_layers(name) else len(self.slices) - 1), 0.0, None
        for number, part in enumerate(self.slices):
            layers = part.sources[0].layers
            if layer < layers:
                return number, layer / (layers - 1) if layers > 1 else 1.0, layer
            layer -= layers
        raise InputError("the tensor is in none of the recipe's slices", file=self.file, tensor=name)

    def written(self) -> Iterator[tuple[str, Settings]]:
        """Yield (key in the recipe, parameters) for every table of parameters."""
        yield "parameters", self.recipe.parameters
        inside = "".join(f"modules.{name}." for name in self.recipe.modules or ())
        if inside:
            yield f"{inside}parameters", self.recipe.part.parameters
        listed = "sources" if self.recipe.part.slices else "models"
        for number, part in enumerate(self.slices):
            where = f"{inside}slices.{number}." if self.recipe.part.slices else inside
            yield f"{where}parameters", part.parameters
            for place, source in enumerate(part.sources):
                yield f"{where}{listed}.{place}.parameters", source.parameters


def _finite(weight: Any) -> float:
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"weight {weight!r}", remedy="give a finite number")
    return number


def _found(parameter: str, tensor: str, depth: float, scopes: Sequence[Settings]) -> Scalar | None:
    """Return what the nearest scope says of a parameter that has something to say of the tensor."""
    for settings in scopes:
        if parameter in settings:
            value = value_at(settings[parameter], tensor, depth)
            if value is not None:
                return value
    return None
