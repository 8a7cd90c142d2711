"""`--save-recipe`: a command line as a recipe for `basis run`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from basiscli.cli.fields import options_of
from basiscli.errors import UsageError

if TYPE_CHECKING:
    from basiscli.cli.command import Command
    from basiscli.cli.fields import Option, Options


def refuse_existing(file: Path) -> None:
    """Raise if a recipe's file exists.

    Raises:
        UsageError: the file exists.
    """
    if file.exists():
        raise UsageError("the recipe exists", file=file, remedy="give --save-recipe another name")


def save(
    file: Path, command: Command, options: Options, *, fail_if: Sequence[str] = (), push_to: str | None = None
) -> None:
    """Write a command and its options into a file as a recipe.

    Args:
        file: the recipe to write.
        command: the command.
        options: its options.
        fail_if: the command's gates.
        push_to: Hub id for a second step that pushes the result.

    Raises:
        UsageError: the file exists, or cannot be written.
    """
    import yaml

    refuse_existing(file)
    step = as_step(command, options) | ({"fail_if": list(fail_if)} if fail_if else {})
    steps = [step, *([{"push": command.name, "to": push_to}] if push_to else [])]
    text = yaml.safe_dump({"steps": steps}, sort_keys=False, allow_unicode=True)
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write the recipe: {error.strerror or error}", file=file) from error


def as_step(command: Command, options: Options) -> dict[str, Any]:
    """Return a command and its options as a step of a recipe: `{"merge": [...], "method": "ties"}`."""
    given, step = None, dict[str, Any]()
    for name, meaning in options_of(type(options)).items():
        value = getattr(options, name)
        if meaning.argument and given is None:
            given = value
        elif name != "output" and not meaning.not_in_recipes and not _goes_without_saying(options, name, meaning):
            step[meaning.recipe or name] = _plain(value)
    return {command.name: _plain(given)} | step


def _goes_without_saying(options: Options, name: str, meaning: Option) -> bool:
    """Return whether a recipe says the same without it, in later versions with other defaults as well."""
    value = getattr(options, name)
    default = type(options).model_fields[name].get_default(call_default_factory=True)
    return value is None or (value == default and (meaning.machine or value is False or value in ({}, [])))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
