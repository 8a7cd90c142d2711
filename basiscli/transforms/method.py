"""A transform as the registry knows it: its name, what it asks for, its parameters and how to call it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ValidationError

from basiscli.errors import UsageError, did_you_mean
from basiscli.transforms.init import DataInit
from basiscli.transforms.merge import Check, OntoWeight, TaskVectorMerge
from basiscli.transforms.parameters import python_name

if TYPE_CHECKING:
    from torch import Tensor


Family = Literal["merge", "init", "compress"]


Trained = Literal["factors", "values", "coefficients"]


@dataclass(frozen=True)
class Method:
    """A transform as the registry knows it: what `@transform` makes of a function or a class."""

    family: Family
    name: str
    doc: str
    source: str
    parameters: type[BaseModel]
    implementation: Any
    elementwise: bool = False
    onto_weight: OntoWeight | None = None
    wants: tuple[str, ...] = ()
    needs_base: bool = True
    rowwise: bool = False
    models: tuple[int, int | None] = (1, None)
    """merge: the fewest and the most models, the base not counted."""
    measure: Callable[..., Any] | None = None
    check: Check | None = None
    principal: bool = False
    """init: whether the factors are the weight's leading part, which a little noise leaves where it is."""
    trains: Trained = "factors"
    """init: A and B of ΔW = s·B·A, the values σ of ΔW = B diag(σ) A alone, or coefficients of random A and B."""

    @property
    def summary(self) -> str:
        """The first line of the documentation."""
        return self.doc.partition("\n")[0]

    @property
    def keeps_factors(self) -> bool:
        """Whether low-rank inputs give a low-rank result that can be written as an adapter."""
        return isinstance(self.implementation, type) and issubclass(self.implementation, TaskVectorMerge)

    @property
    def shares_ranks(self) -> bool:
        """Whether modules get different ranks, which only the data tells; B is zero then, and the base unchanged."""
        return isinstance(self.implementation, type) and issubclass(self.implementation, DataInit)

    @property
    def needs_calibration(self) -> bool:
        """Whether an init needs the inputs of the weights."""
        return self.shares_ranks or "inputs" in self.wants

    def validate(self, given: Mapping[str, Any]) -> BaseModel:
        """Return the parameters as a pydantic model, defaults filled in, from those given by name.

        Raises:
            UsageError: an unknown name (with the nearest known one), a wrong type or a value out of range.
        """
        known = self.parameters.model_fields
        for name in given:
            if name not in known:
                raise UsageError(f"{self.name} has no parameter '{name}'", remedy=did_you_mean(name, known))
        try:
            return self.parameters.model_validate(dict(given))
        except ValidationError as error:
            first = error.errors()[0]
            # Between them pydantic says which form of a PerModel it took; the numbers of a list count from 0.
            where = ".".join(str(part) for part in first["loc"] if part in known or isinstance(part, int))
            raise UsageError(
                f"parameter {where}={first['input']!r} of {self.name}: {first['msg']}",
                remedy=f"`basis methods show {self.name}` lists its parameters",
            ) from error

    def call(self, values: BaseModel, available: Mapping[str, Any]) -> Tensor:
        """Return a function transform's result for what it wants of the available inputs, and its parameters."""
        positional = {name: available[name] for name in self.wants}
        keyword = {python_name(name): value for name, value in values}
        result: Tensor = self.implementation(**positional, **keyword)
        return result

    def find_numbers(self, values: BaseModel, available: Mapping[str, Any]) -> Any:
        """Return what `measure` finds, called with the inputs and parameters that it names; None without one."""
        if self.measure is None:
            return None
        known = {**{python_name(name): value for name, value in values}, **available}
        return self.measure(**{name: known[name] for name in inspect.signature(self.measure).parameters})
