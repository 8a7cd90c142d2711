"""Parameters that may differ from model to model: one number for all, or a list with one a model.

    Share = Annotated[float, Field(ge=0, le=1)]
    def ties(..., *, density: PerModel[Share] = 1.0): ...

The range holds for every number of the list. The plan refuses a list whose length is not the number of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, TypeVar, Union, get_args

from pydantic import BaseModel, Discriminator, Tag
from pydantic.fields import FieldInfo

from basiscli.errors import UsageError

Number = TypeVar("Number", int, float)

_ONE, _LIST = "number", "list"


def _arm(value: Any) -> str:
    return _LIST if isinstance(value, list | tuple) else _ONE


# Told apart by what is given, so that an error speaks of the number that is out of range and not of both forms.
PerModel = Annotated[
    Union[Annotated[Number, Tag(_ONE)], Annotated[list[Number], Tag(_LIST)]],  # noqa: UP007 `|` knows no Annotated
    Discriminator(_arm),
]


def per_model(value: Number | Sequence[Number], count: int) -> list[Number]:
    """Return one number a model."""
    return list(value) if isinstance(value, Sequence) else [value] * count


def check_lengths(method: str, values: BaseModel, count: int) -> None:
    """Refuse lists that do not have one number a model.

    Raises:
        UsageError: a list is too short or too long.
    """
    for name, field in type(values).model_fields.items():
        given = getattr(values, name)
        if is_per_model(field) and isinstance(given, list) and len(given) != count:
            raise UsageError(
                f"parameter {name} of {method}: {len(given)} numbers for {count} models",
                remedy=f"give -p {name}=… one number, or a list with one a model",
            )


def is_per_model(field: FieldInfo) -> bool:
    """Return whether a parameter takes a list with one number a model."""
    return any(isinstance(item, Discriminator) and item.discriminator is _arm for item in field.metadata)


def limits_of(field: FieldInfo) -> list[Any]:
    """Return the range of a parameter's number, or of each number of its list."""
    if not is_per_model(field):
        return list(field.metadata)
    annotated = get_args(get_args(field.annotation)[0])
    return [limit for item in annotated if isinstance(item, FieldInfo) for limit in item.metadata]
