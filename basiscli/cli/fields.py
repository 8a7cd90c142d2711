"""How a command's options are declared: a pydantic model whose fields carry what the terminal, Python and recipes need.

    class NormsOptions(Options):
        model: Annotated[ModelName, argument("Folder, weights file or Hub id.")] = "."
        top: Annotated[int, option("Show this many tensors.", "-n")] = 20

From the model come the command line, the keywords of the Python function, the step of a recipe, `--save-recipe` and the
tables of the docs. A value is spelled the same way everywhere: `target_modules` takes `q_proj,v_proj` and a list alike.
Importing this imports neither typer nor torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from basiscli.errors import UsageError, did_you_mean

Completion = Callable[[Mapping[str, Any]], Iterable[str]]
"""From what the command line holds so far to the values that an option can have."""
Input = Literal["model", "file"]


@dataclass(frozen=True)
class Option:
    """What a field of an options model means to the terminal, to Python and to recipes."""

    help: str
    flags: tuple[str, ...] = ()
    """How the command line spells it, where that is not `--` and the field's name."""
    default: str | None = None
    """What happens where it is not given, in words; a default that is a value is shown anyway."""
    metavar: str | None = None
    panel: str | None = None
    argument: bool = False
    repeat: bool = False
    """Given once a value at the command line, and as a list elsewhere; other lists are written with commas."""
    complete: Completion | None = None
    names: Input | None = None
    """Names a model or a file: in a recipe an earlier step's name may stand there."""
    contents: bool = False
    """Names files whose contents decide the result, and that no step makes."""
    same_bytes: bool = False
    """Any value gives the same result: a recipe's step is not done again for it."""
    machine: bool = False
    """Is about the machine: a recipe that is written leaves it out where it has its default."""
    recipe: str | None = None
    """Its name in a recipe, where that is another."""
    python_only: bool = False
    not_in_recipes: bool = False


def option(help: str, *flags: str, **more: Any) -> Option:  # noqa: A002
    """Return the meaning of an option: its help, its flags if they are not the field's name, and see `Option`."""
    return Option(help, flags, **more)


def argument(help: str, **more: Any) -> Option:  # noqa: A002
    """Return the meaning of a positional argument."""
    return Option(help, argument=True, **more)


class Options(BaseModel):
    """Options of a command. Unknown names are refused; the names that were given are in `model_fields_set`."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    @classmethod
    def of(cls, **given: Any) -> Self:
        """Check what was given by name.

        Raises:
            UsageError: an unknown option, or a value that it does not take.
        """
        try:
            return cls(**given)
        except ValidationError as error:
            raise _refusal(cls, error) from error

    def given(self) -> dict[str, Any]:
        """Return the options that were given, by name."""
        return {name: value for name, value in self if name in self.model_fields_set}

    def but(self, **changes: Any) -> Self:
        """Return the same options with some changed."""
        return self.model_copy(update=changes)


@cache
def options_of(model: type[Options]) -> dict[str, Option]:
    """Return the meaning of every field by its name: the command's own first, then what it shares with others."""
    found: dict[str, Option] = {}
    for owner in model.__mro__:
        for name in getattr(owner, "__annotations__", {}):
            field = model.model_fields.get(name)
            meaning = next((m for m in field.metadata if isinstance(m, Option)), None) if field else None
            if meaning is not None:
                found.setdefault(name, meaning)
    return found


def plain_type(field: FieldInfo) -> Any:
    """Return a field's type without `None` and annotations: what the command line has to make of a word."""
    kind: Any = field.annotation
    while True:
        if get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
        elif get_origin(kind) in (Union, UnionType):
            kinds = [one for one in get_args(kind) if one is not NoneType]
            kind = kinds[0] if len(kinds) == 1 else str
        else:
            return kind


def flag_of(name: str, meaning: Option) -> str:
    """Return the long flag of an option, as messages name it."""
    return next((flag for flag in meaning.flags if flag.startswith("--")), f"--{name.replace('_', '-')}")


def _refusal(model: type[Options], error: ValidationError) -> UsageError:
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    meanings = options_of(model)
    if first["type"] == "extra_forbidden":
        return UsageError(f"no option '{name}'", remedy=did_you_mean(name, meanings))
    if first["type"] == "missing":
        return UsageError(f"{name} is missing", remedy=meanings[name].help)
    value = first["input"]
    if first["type"] == "literal_error":
        kind = plain_type(model.model_fields[name])
        return UsageError(f"{flag_of(name, meanings[name])} {value}", remedy=f"one of {', '.join(get_args(kind))}")
    return UsageError(f"{name}: {first['msg'].lower()}: {value!r}", remedy=meanings[name].help)


# Values, as they are spelled at the command line, in Python and in recipes --------------------------------------------


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _texts(value: Any) -> Any:
    return [_text(one) for one in value] if isinstance(value, list | tuple) else value


ModelName = Annotated[str, BeforeValidator(_text)]
"""A folder, a weights file or a Hub id (`org/name@revision`); paths are taken, too."""
ModelNames = Annotated[list[str], BeforeValidator(_texts)]


def _parameters(pairs: Any) -> Any:
    """Turn `name=value` words into parameters; values are read as JSON where they are JSON."""
    if pairs is None or isinstance(pairs, Mapping):
        return pairs or {}
    parameters: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"not a parameter: '{pair}'", remedy="write -p name=value")
        try:
            parameters[name] = json.loads(value)
        except ValueError:
            parameters[name] = value
    return parameters


Parameters = Annotated[dict[str, Any], BeforeValidator(_parameters)]
"""A method's parameters by name, or words `name=value`."""


def _numbers(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    try:
        return [float(part) for part in given.split(",")]
    except ValueError as error:
        raise UsageError(f"not a list of numbers: '{given}'", remedy="write --weights 1,0.5,2") from error


Weights = Annotated[list[float], BeforeValidator(_numbers)]
"""Numbers, or words such as `1,0.5,2`."""


def whole_numbers(flag: str) -> BeforeValidator:
    """Return what turns '512,2048' into numbers."""

    def parse(given: Any) -> Any:
        if not isinstance(given, str):
            return given
        try:
            return [int(part) for part in given.split(",")] if given else []
        except ValueError as error:
            raise UsageError(
                f"{flag}: not a list of whole numbers: '{given}'", remedy=f"write {flag} 512,2048"
            ) from error

    return BeforeValidator(parse)


def _words(given: Any) -> Any:
    return [word.strip() for word in given.split(",")] if isinstance(given, str) and given else given or []


Words = Annotated[list[str], BeforeValidator(_words)]
"""Words, or one text with commas between them."""


def _target_modules(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    words = given.split(",")
    plain = all(word and word.replace("_", "").replace(".", "").isalnum() for word in words)
    return words if plain and given != "all-linear" else given


TargetModules = Annotated[str | list[str], BeforeValidator(_target_modules)]
"""`all-linear`, names of modules (a list, or with commas between them), or a regular expression for whole names."""


def choices(kind: Any) -> Iterator[str]:
    """Yield the words that a `Literal` stands for; none for another type."""
    if get_origin(kind) is Literal:
        yield from map(str, get_args(kind))
