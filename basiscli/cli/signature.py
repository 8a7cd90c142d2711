"""Typer functions made from the declarations of commands."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_origin

import typer

from basiscli.cli.command import Command
from basiscli.cli.fields import Completion, Option, Options, choices, flag_of, options_of, plain_type
from basiscli.cli.options import Terminal, defaults_of
from basiscli.cli.output import errors_shown
from basiscli.cli.session import Session, invoke

_WORDS = (str, int, float, bool, Path)  # what Typer makes of a word; anything else is text that the model reads
_NAMES = {str: "TEXT", int: "INTEGER", float: "NUMBER", Path: "PATH"}


NO_HELP = {"help_option_names": list[str]()}
"""Typer `context_settings` that replace Typer's `--help` by `HELP`."""


def _show_help(context: typer.Context, wanted: bool) -> None:
    if wanted:
        typer.echo(context.get_help())
        raise typer.Exit


HELP = inspect.Parameter(
    "help",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[
        bool,
        typer.Option(
            "--help", "-h", is_eager=True, callback=_show_help, metavar="", help="Show this message and exit."
        ),
    ],
)
"""Parameter of the option `--help`, which is shown without a type."""


def terminal_function(command: Command) -> Callable[..., None]:
    """Return a function with Typer's signature for a command, which runs it."""
    own = [_parameter(command.model, name, meaning) for name, meaning in options_of(command.model).items()]
    shared = options_of(Terminal)
    told = [_parameter(Terminal, name, shared[name]) for name in shared if name in command.terminal]
    # Arguments in their order, then what may be left out: as a signature has to be.
    parameters = [p for p in own if p is not None] + [p for p in told if p is not None] + [HELP]

    def call(context: typer.Context, **values: Any) -> None:
        if context.invoked_subcommand is not None:
            return
        del values["help"]
        given = {name: value for name, value in values.items() if _was_given(context, name)}
        of_terminal = {name: given.pop(name) for name in list(given) if name in command.terminal}
        with errors_shown(as_json=bool(values.get("as_json"))):
            chosen = command.chosen(given)
            session = Session(chosen, Terminal.of(**of_terminal))
            session.check()
            if session.told.dry_run and "headers_only" in chosen.model.model_fields:
                given["headers_only"] = True
            options = chosen.model.of(**given)
            if chosen.main is not None:
                chosen.load(chosen.main)(options, session)
            else:
                invoke(session, options)

    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    call.__signature__ = inspect.Signature([context, *parameters])  # type: ignore[attr-defined]
    call.__annotations__ = {"context": typer.Context} | {p.name: p.annotation for p in parameters}
    call.__name__ = command.name
    call.__doc__ = command.help
    return call


def _parameter(model: type[Options], name: str, meaning: Option) -> inspect.Parameter | None:
    """Return a parameter as Typer reads it; None for an option that the command line does not have."""
    if meaning.python_only:
        return None
    field = model.model_fields[name]
    kind = plain_type(field)
    words = list(choices(kind))
    kind = list[str] if meaning.repeat or _is_many(kind, meaning) else kind if kind in _WORDS else str
    required = field.is_required()
    default = inspect.Parameter.empty if required else field.get_default(call_default_factory=True)
    if default in ([], {}):
        default = None
    more: dict[str, Any] = {
        "help": _help(meaning),
        "show_default": default is not None and meaning.default is None,
        "metavar": _metavar(name, kind, meaning, words),
        "rich_help_panel": meaning.panel,
        "autocompletion": _completion(meaning.complete, words),
    }
    if name == "config":
        more |= {"callback": defaults_of, "is_eager": True}
    if meaning.argument:
        info: Any = typer.Argument(**more)
    else:
        info = typer.Option(*_flags(name, meaning, is_on=default is True), **more)
    annotation = kind if required or default is not None else kind | None
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, info]
    )


def _flags(name: str, meaning: Option, *, is_on: bool) -> list[str]:
    flags = list(meaning.flags)
    if not any("--" in flag for flag in flags):
        long = flag_of(name, meaning)
        flags = [f"{long}/--no-{long[2:]}" if is_on else long, *flags]
    return flags


def _is_many(kind: Any, meaning: Option) -> bool:
    return meaning.argument and get_origin(kind) is list


def _help(meaning: Option) -> str:
    return meaning.help if meaning.default is None else f"{meaning.help} [default: {meaning.default}]"


def _metavar(name: str, kind: Any, meaning: Option, words: list[str]) -> str | None:
    if meaning.metavar is not None:
        return meaning.metavar
    if kind is bool:
        return ""
    return name.upper() if meaning.argument else "|".join(words) if words else _NAMES.get(kind)


def _completion(complete: Completion | None, words: list[str]) -> Callable[..., Iterable[str]] | None:
    """Return what Typer asks for the values that begin with what is typed."""
    if complete is None and not words:
        return None

    def found(context: typer.Context, incomplete: str) -> list[str]:
        given: Mapping[str, Any] = context.params
        try:
            values = words if complete is None else complete(given)
            return [value for value in values if value.startswith(incomplete)]
        except Exception:  # a shell that completes is no place for an error
            return []

    return found


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"
