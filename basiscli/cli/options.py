"""Options that several commands share, each written once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AliasChoices, Field

from basiscli.cli.completion import dtypes
from basiscli.cli.fields import Options, option

_EXECUTION = "How it runs"
_AFTER = "What follows"


class Device(Options):
    """The option `--device`."""

    device: Annotated[str, option("auto, cpu, cuda or cuda:N.", panel=_EXECUTION, machine=True)] = "auto"


class Storage(Options):
    """The option `--dtype` of results."""

    dtype: Annotated[
        str | None,
        option("Storage dtype of the result: f32, bf16, f16.", default="as stored", complete=dtypes),
    ] = None


class Plugins(Options):
    """The option `--plugin`, for methods in Python files."""

    plugins: Annotated[
        list[Path],
        option("Python file with further methods; repeatable.", "--plugin", metavar="FILE", repeat=True, contents=True),
        Field(validation_alias=AliasChoices("plugins", "plugin")),
    ] = []  # noqa: RUF012  # pydantic copies it


class ShardSize(Options):
    """The option `--shard-size` of results."""

    shard_size: Annotated[str, option("Size limit of a file.", panel=_EXECUTION, machine=True)] = "5GB"


class Workers(Options):
    """Options of parallelism: `--workers`, `--engine`, `--ray-address`."""

    workers: Annotated[
        int | None,
        option("Tensors worked on at a time.", default="processors", panel=_EXECUTION, same_bytes=True),
    ] = None
    engine: Annotated[
        str, option("local, or ray: a cluster that shares this machine's files.", panel=_EXECUTION, machine=True)
    ] = "local"
    ray_address: Annotated[
        str | None,
        option("The cluster; auto finds it.", metavar="HOST:PORT", default="one started here", panel=_EXECUTION),
    ] = None

    def on_a_worker(self) -> Self:
        """Return the options with which a cluster's worker makes the same plan.

        It runs one task at a time, and the output folder of its own run exists already.
        """
        return self.but(engine="local", ray_address=None, overwrite=True, workers=1)


class Memory(Options):
    """The option `--memory`, the budget of tasks on a CPU."""

    memory: Annotated[
        str,
        option(
            "What tensors worked on side by side may take on a CPU; one alone may take more.",
            panel=_EXECUTION,
            same_bytes=True,
            machine=True,
        ),
    ] = "1GB"


class Seed(Options):
    """The option `--seed`."""

    seed: Annotated[int, option("For methods that draw random numbers.", panel=_EXECUTION)] = 0


class Resume(Options):
    """The option `--resume/--no-resume` of an interrupted run."""

    resume: Annotated[
        bool,
        option(
            "Go on where an interrupted run stopped.", "--resume/--no-resume", panel=_EXECUTION, not_in_recipes=True
        ),
    ] = True


class Overwrite(Options):
    """The option `--overwrite` of an earlier output."""

    overwrite: Annotated[bool, option("Replace an earlier output of basis.", panel=_EXECUTION, not_in_recipes=True)] = (
        False
    )


class HeadersOnly(Options):
    """The keyword `headers_only`, for plans that are priced and not run."""

    headers_only: Annotated[
        bool,
        option(
            "For plans: of models of the Hub that are not here fetch headers alone, and accept safetensors files that "
            "end where their data would begin.",
            python_only=True,
            not_in_recipes=True,
        ),
    ] = False


class AllowNonfinite(Options):
    """The option `--allow-nonfinite`."""

    allow_nonfinite: Annotated[bool, option("Accept NaN and Inf.")] = False


class AllowMissing(Options):
    """The option `--allow-missing`, for models with different parameters."""

    allow_missing: Annotated[bool, option("Accept parameters that only some models have: the base's names win.")] = (
        False
    )


class TrustRemoteCode(Options):
    """The option `--trust-remote-code`."""

    trust_remote_code: Annotated[bool, option("Copy *.py files beside the result. Nothing runs them.")] = False


class Terminal(Options):
    """Options that exist only at the terminal, beside a command's own; `Command.terminal` names those that it has."""

    dry_run: Annotated[bool, option("Print the plan and stop.", panel=_EXECUTION)] = False
    fail_if: Annotated[
        list[str],
        option(
            "Exit code 4, and no push, if this is true of the report's numbers: 'kl > 0.1'; repeatable.",
            metavar="CONDITION",
            repeat=True,
            panel=_AFTER,
        ),
    ] = []  # noqa: RUF012
    push_to: Annotated[str | None, option("Push the result to the Hub.", metavar="ORG/NAME[@BRANCH]", panel=_AFTER)] = (
        None
    )
    private: Annotated[bool, option("Make the model private on the Hub.", panel=_AFTER)] = False
    create_pr: Annotated[bool, option("Open a pull request instead of committing.", panel=_AFTER)] = False
    save_recipe: Annotated[
        Path | None, option("Write this command as a recipe for `basis run`.", metavar="FILE", panel=_AFTER)
    ] = None
    progress: Annotated[
        Literal["bar", "json"], option("Bars on a terminal, or json: one JSON object a line on stderr.")
    ] = "bar"
    as_json: Annotated[bool, option("Print one JSON document on stdout.", "--json")] = False
    quiet: Annotated[bool, option("Print the result only.", "-q")] = False
    config: Annotated[Path | None, option("YAML or JSON file with defaults for these options.", metavar="FILE")] = None


def defaults_of(context: Any, file: Path | None) -> Path | None:
    """Set a command's defaults from the YAML or JSON file of `--config`; a Typer callback that returns the file.

    Raises:
        typer.BadParameter: the file cannot be read, or names an option that the command does not have.
    """
    if file is None:
        return None
    import typer
    import yaml

    try:
        table = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"{file}: {error}") from error
    if not isinstance(table, Mapping) or not all(isinstance(name, str) for name in table):
        raise typer.BadParameter(f"{file}: not a table of options")
    names = {parameter.name: parameter.name for parameter in context.command.params}
    names |= {
        flag.lstrip("-").replace("-", "_"): parameter.name
        for parameter in context.command.params
        for flag in parameter.opts
    }
    options: dict[str, Any] = {}
    for word, value in table.items():
        name = names.get(word.replace("-", "_"))
        if name is None:
            raise typer.BadParameter(f"{file}: no option '{word}' of this command")
        options[name] = value
    context.default_map = {**(context.default_map or {}), **options}
    return file
