"""Options that several commands share, and `--config`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from basiscli.cli.output import ProgressStyle
from basiscli.errors import UsageError

_EXECUTION = "How it runs"
_AFTER = "What follows"


def _read_config(context: typer.Context, file: Path | None) -> Path | None:
    """Take defaults for a command's options from a YAML or JSON file, before the other options are read."""
    if file is None:
        return None
    import yaml

    try:
        table = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"{file}: {error}") from error
    known = {parameter.name for parameter in context.command.params}
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table):
        raise typer.BadParameter(f"{file}: not a table of options")
    options: dict[str, Any] = {name.replace("-", "_"): value for name, value in table.items()}
    for name in options:
        if name not in known:
            raise typer.BadParameter(f"{file}: no option '{name}' of this command")
    context.default_map = {**(context.default_map or {}), **options}
    return file


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the result only.")]
Progress = Annotated[
    ProgressStyle,
    typer.Option("--progress", help="Bars on a terminal, or json: one JSON object a line on stderr."),
]
FailIf = Annotated[
    list[str] | None,
    typer.Option(
        "--fail-if",
        metavar="CONDITION",
        help="Exit code 4, and no push, if this is true of the report's numbers: 'kl > 0.1'; repeatable.",
        rich_help_panel=_AFTER,
    ),
]
PushTo = Annotated[
    str | None,
    typer.Option(
        "--push-to",
        metavar="ORG/NAME[@BRANCH]",
        help="Push the result to the Hub.",
        show_default=False,
        rich_help_panel=_AFTER,
    ),
]
Private = Annotated[bool, typer.Option("--private", help="Make the model private on the Hub.", rich_help_panel=_AFTER)]
CreatePr = Annotated[
    bool, typer.Option("--create-pr", help="Open a pull request instead of committing.", rich_help_panel=_AFTER)
]
SaveRecipe = Annotated[
    Path | None,
    typer.Option(
        "--save-recipe",
        metavar="FILE",
        help="Write this command as a recipe for `basis run`.",
        show_default=False,
        rich_help_panel=_AFTER,
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        callback=_read_config,
        is_eager=True,
        help="YAML or JSON file with defaults for these options.",
    ),
]
Plugins = Annotated[list[Path] | None, typer.Option("--plugin", help="Python file with further methods; repeatable.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=_EXECUTION)]
Dtype = Annotated[
    str | None,
    typer.Option(help="Storage dtype of the result: f32, bf16, f16. [default: as stored]", show_default=False),
]
ShardSize = Annotated[str, typer.Option(help="Size limit of a file.", rich_help_panel=_EXECUTION)]
Memory = Annotated[
    str,
    typer.Option(
        help="What tensors worked on side by side may take on a CPU; one alone may take more.",
        rich_help_panel=_EXECUTION,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        help="Tensors worked on at a time. [default: processors]",
        show_default=False,
        rich_help_panel=_EXECUTION,
    ),
]
Engine = Annotated[
    str,
    typer.Option(help="local, or ray: a cluster that shares this machine's files.", rich_help_panel=_EXECUTION),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="The cluster; auto finds it. [default: one started here]",
        show_default=False,
        rich_help_panel=_EXECUTION,
    ),
]
Seed = Annotated[int, typer.Option(help="For methods that draw random numbers.", rich_help_panel=_EXECUTION)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.", rich_help_panel=_EXECUTION)]
Resume = Annotated[
    bool,
    typer.Option("--resume/--no-resume", help="Go on where an interrupted run stopped.", rich_help_panel=_EXECUTION),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier output of basis.", rich_help_panel=_EXECUTION)
]
AllowNonfinite = Annotated[bool, typer.Option("--allow-nonfinite", help="Accept NaN and Inf.")]
AllowMissing = Annotated[
    bool,
    typer.Option("--allow-missing", help="Accept parameters that only some models have: the base's names win."),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Copy *.py files beside the result. Nothing runs them.")
]


def parse_parameters(pairs: list[str]) -> dict[str, Any]:
    """Turn `name=value` words into parameters; values are read as JSON where they are JSON."""
    import json

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


def parse_weights(text: str | None) -> list[float] | None:
    """Turn '1,0.5,2' into numbers."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"not a list of numbers: '{text}'", remedy="write --weights 1,0.5,2") from error


def one_of(option: str, word: str, known: tuple[str, ...]) -> str:
    """Return a word that an option takes.

    Raises:
        UsageError: any other word.
    """
    if word not in known:
        raise UsageError(f"{option} {word}", remedy=f"one of {', '.join(known)}")
    return word


def parse_integers(option: str, text: str | None) -> list[int]:
    """Turn '512,2048' into numbers."""
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise UsageError(
            f"{option}: not a list of whole numbers: '{text}'", remedy=f"write {option} 512,2048"
        ) from error
