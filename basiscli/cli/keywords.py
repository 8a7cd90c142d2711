"""Signatures and docstrings of the Python functions, from the same options as the command line."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from typing import Annotated, Any, ParamSpec, TypeVar

from pydantic import BeforeValidator

from basiscli.cli.fields import Option, Options, options_of

Made = TypeVar("Made")
Call = ParamSpec("Call")
_FURTHER = "**options: by name:"


def keywords(model: type[Options]) -> Callable[[Callable[Call, Made]], Callable[Call, Made]]:
    """Return a decorator that gives a function with `**options` the keywords and documentation of an options class.

    Parameters that the function names itself stay; every other field becomes a keyword with its default, and a line
    of the docstring below `**options: by name:`.
    """

    def decorate(function: Callable[Call, Made]) -> Callable[Call, Made]:
        signature = inspect.signature(function)
        named = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        taken = {parameter.name for parameter in named}
        further = {name: meaning for name, meaning in options_of(model).items() if name not in taken}
        parameters = [*named, *(_parameter(model, name) for name in further)]
        function.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=sorted(parameters, key=lambda parameter: parameter.kind)
        )
        function.__doc__ = _documented(function.__doc__ or "", model, further)
        return function

    return decorate


def _parameter(model: type[Options], name: str) -> inspect.Parameter:
    field = model.model_fields[name]
    default = inspect.Parameter.empty if field.is_required() else field.get_default(call_default_factory=True)
    kind: Any = field.annotation
    if any(isinstance(item, BeforeValidator) for item in field.metadata):  # it takes more than it makes of it
        kind = Annotated[kind, *field.metadata]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def _documented(text: str, model: type[Options], further: dict[str, Option]) -> str:
    """Return a docstring with a line for every further keyword below its `**options: by name:`."""
    before, found, after = text.partition(_FURTHER)
    if not found:
        return text
    indent = " " * (4 + len(before) - len(before.rstrip(" ")))
    lines: list[str] = []
    for name, meaning in further.items():
        field = model.model_fields[name]
        default = meaning.default or ("" if field.is_required() or field.default in (None, [], {}) else field.default)
        told = f"{meaning.help} [default: {default}]" if default != "" else meaning.help
        lines.append(textwrap.indent(textwrap.fill(f"{name}: {told}", 108, subsequent_indent="    "), indent))
    return before + found + "\n\n" + "\n".join(lines) + after
