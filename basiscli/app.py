"""The Typer application of `basis`, made from the declarations of the installed commands.

Importing it must stay cheap: commands import what they need when they run, and of a call that names a command only that
one's declaration is read.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from typing import Annotated, Any

import typer

from basiscli.cli.command import Command, command_points, load_command
from basiscli.errors import UsageError
from basiscli.version import __version__

_COMPLETION = "_BASIS_COMPLETE"  # set by the shell that asks for completions


def assemble(words: Sequence[str] | None = None) -> typer.Typer:
    """Return the Typer application; for a command line's words, only the command that they name is fully loaded."""
    app = typer.Typer(
        name="basis",
        help="Model surgery: merge, compress and initialise checkpoints and adapters.",
        no_args_is_help=True,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_basis)
    try:
        points = command_points()
    except UsageError as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        raise SystemExit(error.exit_code) from error
    named = next((word for word in words or () if not word.startswith("-")), None)
    for command in _loaded([points[named]] if named in points else list(points.values())):
        if words is not None and command.name != named:
            app.command(command.name, help=command.help)(_not_named)
        elif command.group is not None:
            app.add_typer(command.load(command.group)(), name=command.name)
        else:
            from basiscli.cli.signature import NO_HELP, terminal_function

            app.command(command.name, context_settings=NO_HELP)(terminal_function(command))
    return app


def _not_named() -> None:
    """Stand for a command in the list of commands."""


def _loaded(points: Sequence[EntryPoint]) -> list[Command]:
    """Return commands in their order; one that does not load is a line of warning and no more."""
    found = []
    for point in points:
        try:
            found.append(load_command(point))
        except UsageError as error:
            typer.secho(f"warning: {error}", err=True, fg="yellow")
    return sorted(found, key=lambda command: (command.position, command.name))


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"basis {__version__}")  # noqa: T201
        raise typer.Exit


def _basis(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.", metavar="")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line."""
    assemble(None if _COMPLETION in os.environ else sys.argv[1:])()


def __getattr__(name: str) -> Any:
    """Make the application with all commands on first access: `from basiscli.app import app`."""
    if name != "app":
        raise AttributeError(f"module 'basiscli.app' has no attribute '{name}'")
    globals()["app"] = assemble()
    return globals()["app"]


def __dir__() -> list[str]:
    return [*globals(), "app"]
