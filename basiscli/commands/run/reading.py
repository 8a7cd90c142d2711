"""Reading and checking of recipe files, with errors that name the wrong key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from basiscli.errors import InputError, UsageError, did_you_mean

if TYPE_CHECKING:
    import yaml

_MOST_BYTES = 1 << 20
_MOST_VALUES = 100_000  # with every alias written out
# What pydantic calls the forms that a value may take.
_FORM = re.compile(r"bool|int|float|str|Conditional|\w+\[.*\]|function-.*|as-.*")


class Strict(BaseModel):
    """Base of the schemas of recipes: immutable, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Part = TypeVar("Part", bound=BaseModel)


def read_yaml(file: Path) -> dict[str, Any]:
    """Return the top-level table of a recipe file as a dictionary.

    Raises:
        InputError: the file is missing, too large, not YAML or not a table, has several documents or a key twice.
    """
    import yaml

    try:
        if file.stat().st_size > _MOST_BYTES:
            raise InputError("too large for a recipe", file=file, remedy="give a YAML file of steps")
        loader = yaml.SafeLoader(file.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if root is not None:
            _count(root, {})
        table = None if root is None else loader.construct_document(root)
    except OSError as error:
        raise InputError(
            f"cannot read the recipe: {error.strerror or error}", file=file, remedy="check the path"
        ) from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        problem = " ".join(str(error).split())
        raise InputError(f"not a recipe: {problem}", file=file, remedy="mend the YAML; one document a file") from error
    if not isinstance(table, dict) or not all(isinstance(key, str) for key in table):
        raise InputError(
            "not a recipe: a table of keys and values is expected", file=file, remedy="see docs/recipes.md"
        )
    return table


def _count(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Return how many values a node holds once its aliases are written out; None in `known` marks those it lies in.

    A few lines of aliases of aliases stand for more values than any memory holds. Of a key that is given twice YAML
    readers take the last without a word.

    Raises:
        ValueError: too many, an alias of what it is part of, or a key twice.
    """
    if id(node) in known:
        total = known[id(node)]
        if total is None:
            raise ValueError(f"line {node.start_mark.line + 1}: an alias of what it is part of")
        return total
    known[id(node)] = None
    total, keys = 1, set()
    for entry in node.value if isinstance(node.value, list) else []:
        pair = entry if isinstance(entry, tuple) else (entry,)
        if len(pair) == 2 and isinstance(key := pair[0].value, str):
            if key in keys:
                raise ValueError(f"line {pair[0].start_mark.line + 1}: the key '{key}' is given twice")
            keys.add(key)
        total += sum(_count(part, known) for part in pair)
        if total > _MOST_VALUES:
            raise ValueError(f"more than {_MOST_VALUES} values once its aliases are written out")
    known[id(node)] = total
    return total


@contextmanager
def in_recipe(file: Path, key: str = "") -> Iterator[None]:
    """Turn a `UsageError` of the block into an `InputError` that names the recipe and a key in it."""
    try:
        yield
    except UsageError as error:
        raise InputError(f"{key}: {error.what}" if key else error.what, file=file, remedy=error.remedy) from error


def parse(model: type[Part], table: Mapping[str, Any], file: Path, within: str = "") -> Part:
    """Return a table as an instance of a schema; `within` is the key of the table in the recipe.

    Raises:
        InputError: the table does not fit, with the key in the file and, for an unknown key, the nearest known one.
    """
    try:
        return model.model_validate(dict(table))
    except ValidationError as error:
        # Of the forms that a value may take, the one that went furthest is the one that was meant.
        first = max(error.errors(), key=lambda e: (e["type"] == "extra_forbidden", len(e["loc"])))
        location = [part for part in first["loc"] if isinstance(part, int) or not _FORM.fullmatch(str(part))]
        where = ".".join(map(str, [within, *location] if within else location))
        if first["type"] == "extra_forbidden":
            key = str(first["loc"][-1])
            known = _known_keys(model, location[:-1])
            raise InputError(f"unknown key '{key}' ({where})", file=file, remedy=did_you_mean(key, known)) from error
        what = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{where or 'recipe'}: {what}", file=file, remedy="see docs/recipes.md") from error


def _known_keys(model: type[BaseModel], location: list[str | int]) -> set[str]:
    """Return the keys that a schema has at a location in the file."""
    found: Any = model
    for part in location:
        field = next((one.model_fields[part] for one in _models_in(found) if part in one.model_fields), None)
        if field is not None:  # else an index of a list, or a name that the user chose
            found = field.annotation
    return {key for one in _models_in(found) for key in one.model_fields}


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)
