"""Our own recipes: a list of steps, each one command with its options under the names the Python functions have.

    steps:
      - merge: [sre, jobs]
        name: merged
        base: minilm
        method: ortho
      - eval: merged
        text: held-out.txt
        fail_if: perplexity > 20

The options are not written down a second time: they are the functions' own signatures.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Required, Unpack, get_args, get_origin

from pydantic import BaseModel, ConfigDict, create_model

from basiscli.commands.evaluate.api import number_names
from basiscli.commands.run.reading import Strict, in_recipe, parse
from basiscli.commands.run.state import STATE
from basiscli.errors import InputError, did_you_mean
from basiscli.gates import Gate, parse_gate


@dataclass(frozen=True)
class Command:
    """What a step can do: a Python function, and the one that only plans the same."""

    module: str
    function: str
    planner: str | None = None

    def load(self, name: str) -> Callable[..., Any]:
        """Return one of the two."""
        found: Callable[..., Any] = getattr(import_module(self.module), name)
        return found


COMMANDS = {
    "merge": Command("basiscli.commands.merge.api", "merge", "plan_merge"),
    "init": Command("basiscli.commands.init.api", "init", "plan_init"),
    "extract": Command("basiscli.commands.init.api", "extract", "plan_extract"),
    "compress": Command("basiscli.commands.kv.api", "compress", "plan_compress"),
    "expand": Command("basiscli.commands.expand.api", "expand"),
    "eval": Command("basiscli.commands.evaluate.api", "evaluate"),
    "push": Command("basiscli.commands.push.api", "push"),
}
_NOLA = Command("basiscli.commands.nola.api", "compress_adapter", "plan_adapter")
INPUTS = frozenset({"base", "onto", "initial", "against", "calibration", "text", "task_path"})
"""Options that name a model or a file. There, and after the command, a step's name stands for its result."""
_ABOUT = frozenset({"name", "fail_if"})
_NAME = re.compile(r"[A-Za-z0-9][\w-]{0,99}", re.ASCII)
_OURS = frozenset({"output", "progress", "overwrite", "resume", "headers_only"})  # the pipeline's business


class Recipe(Strict):
    """A whole file."""

    steps: list[dict[str, Any]]


@dataclass(frozen=True)
class Step:
    """One command of a pipeline."""

    name: str
    word: str
    """The command's, as the command line has it."""
    command: Command
    given: list[str]
    """What comes after the command: models, or one model, adapter or folder."""
    options: Mapping[str, Any]
    gates: list[Gate]

    @property
    def makes_model(self) -> bool:
        """Whether it writes a folder that later steps can use."""
        return self.word not in {"eval", "push"}


def read_steps(table: Mapping[str, Any], file: Path) -> list[Step]:
    """Check a table against the schema of our recipes.

    Raises:
        InputError: an unknown command or option, a value of a wrong type, a name that is taken twice.
    """
    steps: list[Step] = []
    for place, given in enumerate(parse(Recipe, table, file).steps):
        step = _step(given, f"steps.{place}", file, [one.name for one in steps])
        if step.name in {one.name for one in steps}:
            raise InputError(f"two steps are called '{step.name}'", file=file, remedy="give each a name of its own")
        steps.append(step)
    if not steps:
        raise InputError("the recipe has no steps", file=file, remedy="see docs/recipes.md")
    return steps


def _step(given: Mapping[str, Any], where: str, file: Path, taken: list[str]) -> Step:
    commands = [key for key in given if key in COMMANDS]
    if len(commands) != 1:
        unknown = next((key for key in given if key not in _ABOUT), "")
        remedy = "a step has one command" if commands else did_you_mean(unknown, COMMANDS)
        raise InputError(f"{where}: {' and '.join(commands) or 'no command'}", file=file, remedy=remedy)
    word = commands[0]
    command = command_of(word, given.get("method"))
    checked: BaseModel = parse(schema_of(word, given.get("method")), given, file, where)
    words, fail_if = getattr(checked, word), getattr(checked, "fail_if", None) or []
    options = {key: value for key, value in checked if key in checked.model_fields_set - _ABOUT - {word}}
    if command is _NOLA:
        del options["method"]
    name = getattr(checked, "name", None) or _free(word, taken)
    if not _NAME.fullmatch(name) or name == Path(STATE).stem:
        raise InputError(
            f"{where}: '{name}' is no name for a step", file=file, remedy="letters, digits, - and _, up to 100"
        )
    with in_recipe(file, f"{where}.fail_if"):
        gates = [parse_gate(text) for text in ([fail_if] if isinstance(fail_if, str) else fail_if)]
        if word == "eval":
            timed, tasks = options.get("contexts") or (), options.get("tasks") or ()
            known = number_names(pair="against" in options, contexts=timed, tasks=tasks)
            for gate in gates:
                gate.check_names(known)
    given_words = [str(one) for one in words] if isinstance(words, list) else [str(words)]
    return Step(name, word, command, given_words, options, gates)


def _free(command: str, taken: list[str]) -> str:
    names = [command, *(f"{command}-{number}" for number in range(2, len(taken) + 2))]
    return next(name for name in names if name not in taken)


def command_of(word: str, method: Any = None) -> Command:
    """Return the command that a step's word stands for; `compress` is two, and the method tells them apart."""
    return _NOLA if word == "compress" and method == "nola" else COMMANDS[word]


def schema_of(word: str, method: Any = None) -> type[BaseModel]:
    """Return the pydantic model of a step: the command's argument, a name, gates, and the function's options."""
    return _schema(word, command_of(word, method))


@cache
def _schema(word: str, command: Command) -> type[BaseModel]:
    function = command.load(command.function)
    hints = typing.get_type_hints(function)
    fields: dict[str, Any] = {word: (list[str] if word == "merge" else str, ...), "name": (str | None, None)}
    if word == "push":
        fields["to"] = (str, ...)
    elif word != "expand":  # it has no numbers
        fields["fail_if"] = (str | list[str] | None, None)
    if command is _NOLA:
        fields["method"] = (Literal["nola"], ...)
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.name not in _OURS:
            required = parameter.default is inspect.Parameter.empty
            fields[parameter.name] = (hints[parameter.name], ... if required else parameter.default)
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            hint = hints[parameter.name]
            table = get_args(hint)[0] if get_origin(hint) is Unpack else hint
            # Not `__required_keys__`: of annotations that are strings it knows nothing.
            for name, kind in typing.get_type_hints(table, include_extras=True).items():
                if name not in _OURS:
                    needed = get_origin(kind) is Required
                    fields[name] = (get_args(kind)[0], ...) if needed else (kind | None, None)
    return create_model(f"{word}_step", __config__=ConfigDict(extra="forbid", frozen=True), **fields)
