"""`--save-recipe`: the command as a step of a recipe, which `basis run` does again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from basiscli.errors import UsageError

Made = TypeVar("Made")
Call = ParamSpec("Call")
_DEFAULTS = {"device": "auto", "engine": "local", "shard_size": "5GB", "memory": "1GB"}


def saved(
    file: Path | None,
    command: str,
    function: Callable[Call, Made],
    *,
    fail_if: Sequence[str] | None = None,
    push_to: str | None = None,
    method: str | None = None,
) -> Callable[Call, Made]:
    """Return a function that does the same and then, if a file is given, writes the call into it as a recipe.

    Args:
        file: where the recipe goes.
        command: the command's name in a recipe.
        function: the Python function that the command calls, or the one that plans its work: what it refuses
            becomes no recipe.
        fail_if: the command's gates.
        push_to: where the result is pushed; a step of its own.
        method: what a function of one method does not take.

    Raises:
        UsageError: the file exists.
    """
    if file is None:
        return function
    if file.exists():
        raise UsageError("the recipe exists", file=file, remedy="give --save-recipe another name")

    def call(*given: Call.args, **options: Call.kwargs) -> Made:
        made = function(*given, **options)
        named = {"method": method} if method else {}
        step = _step(command, given[0], named | options) | ({"fail_if": list(fail_if)} if fail_if else {})
        steps = [step, *([{"push": command, "to": push_to}] if push_to else [])]
        _write(file, steps)
        return made

    return call


def _step(command: str, given: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    from basiscli.commands.run.steps import schema_of

    fields = schema_of(command, options.get("method")).model_fields
    said = {name: _plain(value) for name, value in options.items() if name in fields}
    return {command: _plain(given)} | {name: value for name, value in said.items() if not _is_default(name, value)}


def _is_default(name: str, value: Any) -> bool:
    return value is None or value is False or value in ({}, []) or _DEFAULTS.get(name) == value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _write(file: Path, steps: list[dict[str, Any]]) -> None:
    import yaml

    text = yaml.safe_dump({"steps": steps}, sort_keys=False, allow_unicode=True)
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write the recipe: {error.strerror or error}", file=file) from error
