"""The decorator that makes a function or a class a transform."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel

from basiscli.transforms.compress import KVCompression
from basiscli.transforms.init import DataInit
from basiscli.transforms.merge import Check, OntoWeight, TaskVectorMerge
from basiscli.transforms.method import Family, Method, Trained
from basiscli.transforms.parameters import parameters_of, python_name

_POSITIONAL: dict[Family, tuple[str, ...]] = {
    "merge": ("base", "others", "weights", "seed", "start", "measured", "earlier"),
    "init": ("weight", "rank", "svd", "inputs", "random"),
    "compress": (),
}


_MEASURE = ("blocks", "weights", "seed", "earlier")


Target = TypeVar("Target")


def transform(
    family: Family,
    *,
    name: str | None = None,
    source: str = "",
    elementwise: bool = False,
    rowwise: bool = False,
    models: tuple[int, int | None] | None = None,
    measure: Callable[..., Any] | None = None,
    check: Check | None = None,
    onto_weight: OntoWeight | None = None,
    principal: bool = False,
    trains: Trained = "factors",
) -> Callable[[Target], Target]:
    """Make a function, a `TaskVectorMerge`, a `DataInit` or a `KVCompression` class a transform.

    Args:
        family: the command it serves.
        name: the name at the command line; by default the function's own, or the class's in lower case.
        source: paper and equation.
        elementwise: every element of the result depends on the models' elements at its index alone.
        rowwise: every row of the result depends on the models' rows at its index alone.
        models: the fewest and the most models a merge takes (None: any number), the base not counted; by default two
            or more, and with a base one or more.
        measure: finds numbers of the whole tensor from its blocks; what it returns is the function's `measured`.
        check: raises UsageError for parameters or weights that make no sense together.
        onto_weight: for `--onto`: from an earlier merge's history to the weight its result takes as the first model.
        principal: for `--quantize`: an init that takes the leading part of a matrix, and may be asked again for that of
            what a quantised base lacks.
        trains: what of an init's result is trained: A and B, the values between them alone, or coefficients of random
            bases.
    """

    def register(target: Target) -> Target:
        doc = inspect.getdoc(target) or ""
        if isinstance(target, type) and issubclass(target, KVCompression | DataInit):
            method = Method(family, name or target.__name__.lower(), doc, source, target.Parameters, target)
        elif isinstance(target, type) and issubclass(target, TaskVectorMerge):
            method = Method(
                family, name or target.__name__.lower(), doc, source, target.Parameters, target,
                onto_weight=target.onto_weight,
            )  # fmt: skip
        elif inspect.isfunction(target):
            wants, needs_base = _wants(target, family)
            parameters = parameters_of(target)
            _check_measure(measure, parameters)
            method = Method(
                family, name or target.__name__, doc, source, parameters, target, elementwise, onto_weight, wants,
                needs_base, rowwise, models or (1 if needs_base else 2, None), measure, check, principal, trains,
            )  # fmt: skip
        else:
            raise TypeError("a transform is a function, or a TaskVectorMerge, DataInit or KVCompression class")
        target.basis_method = method  # type: ignore[attr-defined]
        return target

    return register


def _wants(function: Callable[..., Any], family: Family) -> tuple[tuple[str, ...], bool]:
    """Return the inputs that a function's positional parameters name, and whether it cannot do without a base."""
    positional = [
        p for p in inspect.signature(function).parameters.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY
    ]
    for parameter in positional:
        if parameter.name not in _POSITIONAL[family]:
            known = ", ".join(_POSITIONAL[family]) or "nothing"
            raise TypeError(
                f"{function.__name__}: a {family} function takes {known}, not '{parameter.name}'; "
                "its own parameters are keyword-only"
            )
    needs_base = any(p.name == "base" and p.default is inspect.Parameter.empty for p in positional)
    return tuple(p.name for p in positional), needs_base


def _check_measure(measure: Callable[..., Any] | None, parameters: type[BaseModel]) -> None:
    if measure is None:
        return
    known = {*_MEASURE, *map(python_name, parameters.model_fields)}
    for asked in inspect.signature(measure).parameters:
        if asked not in known:
            raise TypeError(f"{measure.__name__}: there is no input or parameter '{asked}'")
