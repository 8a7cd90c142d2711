"""Declaration of a command's options: a pydantic model whose fields are annotated for terminal, Python and recipes.

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
"""Returns the values that an option can have, given the command line so far."""
Input = Literal["model", "file"]


@dataclass(frozen=True)
class Option:
    """Annotation of an options field: its help, flags and use at the terminal, in Python and in recipes."""

    help: str
    flags: tuple[str, ...] = ()
    """Flags at the command line; by default `--` and the field's name."""
    default: str | None = None
    """Description of the default, where the value does not say it; a default that is a value is shown anyway."""
    metavar: str | None = None
    panel: str | None = None
    """Heading in `--help`."""
    argument: bool = False
    """Whether it is positional."""
    repeat: bool = False
    """Whether the flag is repeated for each value of a list; other lists are written with commas."""
    complete: Completion | None = None
    names: Input | None = None
    """Set if the value is a model or a file, for which a recipe may have an earlier step's name."""
    contents: bool = False
    """Whether the values are files whose contents the result depends on and that no step makes, such as plugins."""
    same_bytes: bool = False
    """Whether the result is the same for any value, so that a recipe's step is not run again for another."""
    machine: bool = False
    """Whether it is about the machine; `--save-recipe` leaves out its default."""
    recipe: str | None = None
    """Its name in a recipe; by default the field's."""
    python_only: bool = False
    """Whether the command line does not have it."""
    not_in_recipes: bool = False


def option(help: str, *flags: str, **more: Any) -> Option:  # noqa: A002
    """Return the annotation of an option: its help, its flags, and further fields of `Option`."""
    return Option(help, flags, **more)


def argument(help: str, **more: Any) -> Option:  # noqa: A002
    """Return the annotation of a positional argument."""
    return Option(help, argument=True, **more)


class Options(BaseModel):
    """Base of the options of a command: immutable, and unknown names are errors.

        options = NormsOptions.of(model="merged", top=3)
        options.given()  # {"model": "merged", "top": 3}
        options.but(top=10)

    The fields' annotations are read by `options_of`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    @classmethod
    def of(cls, **given: Any) -> Self:
        """Return checked options from keywords.

        Raises:
            UsageError: an unknown option, a missing one, or a wrong value.
        """
        try:
            return cls(**given)
        except ValidationError as error:
            raise _refusal(cls, error) from error

    def given(self) -> dict[str, Any]:
        """Return the options that were given, without defaults, by name."""
        return {name: value for name, value in self if name in self.model_fields_set}

    def but(self, **changes: Any) -> Self:
        """Return a copy with some options changed, unchecked."""
        return self.model_copy(update=changes)


@cache
def options_of(model: type[Options]) -> dict[str, Option]:
    """Return the annotation of every field by name: the command's own first, then shared ones."""
    found: dict[str, Option] = {}
    for owner in model.__mro__:
        for name in getattr(owner, "__annotations__", {}):
            field = model.model_fields.get(name)
            meaning = next((m for m in field.metadata if isinstance(m, Option)), None) if field else None
            if meaning is not None:
                found.setdefault(name, meaning)
    return found


def plain_type(field: FieldInfo) -> Any:
    """Return a field's type without `None` and annotations, as the command line parses it; `str` for other unions."""
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
    """Return the long flag of an option: `--kv-ratio`."""
    return next((flag for flag in meaning.flags if flag.startswith("--")), f"--{name.replace('_', '-')}")


def _refusal(model: type[Options], error: ValidationError) -> UsageError:
    first = error.errors()[0]
    meanings = options_of(model)
    name = str(first["loc"][0]) if first["loc"] else ""
    name = next((field for field in meanings if name in _spellings(model, field)), name)
    if first["type"] == "extra_forbidden":
        return UsageError(f"no option '{name}'", remedy=did_you_mean(name, meanings))
    if first["type"] == "missing":
        return UsageError(f"{name} is missing", remedy=meanings[name].help)
    value = first["input"]
    if first["type"] == "literal_error":
        kind = plain_type(model.model_fields[name])
        return UsageError(f"{flag_of(name, meanings[name])} {value}", remedy=f"one of {', '.join(get_args(kind))}")
    return UsageError(f"{name}: {first['msg'].lower()}: {value!r}", remedy=meanings[name].help)


def _spellings(model: type[Options], name: str) -> list[str]:
    """Return what a field may be called: its name, and its aliases where it has some."""
    alias = model.model_fields[name].validation_alias
    return [name, *(str(one) for one in getattr(alias, "choices", [alias] if alias else []))]


# Values, as they are spelled at the command line, in Python and in recipes --------------------------------------------


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _texts(value: Any) -> Any:
    return [_text(one) for one in value] if isinstance(value, list | tuple) else value


ModelName = Annotated[str, BeforeValidator(_text)]
"""A folder, a weights file or a Hub id (`org/name@revision`), as a string or `Path`."""
ModelNames = Annotated[list[str], BeforeValidator(_texts)]
"""A list of them."""


def _parameters(pairs: Any) -> Any:
    """Turn `name=value` words into parameters; values are read as JSON where they are JSON."""
    if pairs is None or isinstance(pairs, Mapping):
        return pairs or {}
    pairs = [pairs] if isinstance(pairs, str) else pairs
    parameters: dict[str, Any] = {}
    for pair in pairs if isinstance(pairs, list | tuple) else [pairs]:
        name, equals, value = str(pair).partition("=")
        if not equals or not name or not isinstance(pair, str):
            raise UsageError(f"not a parameter: '{pair}'", remedy="write -p name=value")
        try:
            parameters[name] = json.loads(value)
        except ValueError:
            parameters[name] = value
    return parameters


Parameters = Annotated[dict[str, Any], BeforeValidator(_parameters)]
"""A method's parameters: a mapping, or a list of `name=value`."""


def _numbers(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    try:
        return [float(part) for part in given.split(",")]
    except ValueError as error:
        raise UsageError(f"not a list of numbers: '{given}'", remedy="write --weights 1,0.5,2") from error


Weights = Annotated[list[float], BeforeValidator(_numbers)]
"""A list of numbers, or a string such as `1,0.5,2`."""


def whole_numbers(flag: str) -> BeforeValidator:
    """Return a validator that turns '512,2048' into integers; `flag` is for its messages."""

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
"""A list of words, or a string with commas between them."""


def _target_modules(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    words = given.split(",")
    plain = all(word and word.replace("_", "").replace(".", "").isalnum() for word in words)
    return words if plain and given != "all-linear" else given


TargetModules = Annotated[str | list[str], BeforeValidator(_target_modules)]
"""`all-linear`, names of modules (a list, or with commas between them), or a regular expression for whole names."""


def choices(kind: Any) -> Iterator[str]:
    """Yield the values of a `Literal` type; nothing for another type."""
    if get_origin(kind) is Literal:
        yield from map(str, get_args(kind))
