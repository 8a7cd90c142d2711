"""The schema of basis's own recipes: a list of steps, each one command with the Python function's keywords.

    steps:
      - merge: [sre, jobs]
        name: merged
        base: minilm
        method: ortho
      - eval: merged
        text: held-out.txt
        fail_if: perplexity > 20

The options are not written down a second time: they are those that the commands declare.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, create_model

from basiscli.cli.command import Command, command_points, load_command
from basiscli.cli.fields import Options, options_of, plain_type
from basiscli.commands.run.reading import Strict, in_recipe, parse
from basiscli.commands.run.state import STATE
from basiscli.errors import InputError, UsageError, did_you_mean
from basiscli.gates import Gate, parse_gate

_ABOUT = frozenset({"name", "fail_if"})
_NAME = re.compile(r"[A-Za-z0-9][\w-]{0,99}", re.ASCII)


class Recipe(Strict):
    """A whole recipe file."""

    steps: list[dict[str, Any]]


@dataclass(frozen=True)
class Step:
    """One command of a pipeline."""

    name: str
    command: Command
    given: list[str]
    """The command's argument: models, or one model, adapter or folder."""
    options: Mapping[str, Any]
    """Values by field name of the command's options."""
    gates: list[Gate]
    """Its `fail_if`."""

    @property
    def word(self) -> str:
        """The command's name, as the command line has it."""
        return self.command.name

    @property
    def makes_model(self) -> bool:
        """Whether it writes a model or adapter that later steps can use."""
        return self.command.makes == "model"

    @property
    def inputs(self) -> list[str]:
        """Names of its options whose value is a model or file, or an earlier step's name."""
        meanings = options_of(self.command.model)
        return sorted(name for name in self.options if meanings[name].names is not None)

    @property
    def sources(self) -> list[str]:
        """Names of options whose value is a file that the result depends on and that no step makes, such as plugins."""
        return sorted(name for name, meaning in options_of(self.command.model).items() if meaning.contents)

    @property
    def decisive(self) -> dict[str, Any]:
        """Its options without those that never change the result, such as `workers`."""
        meanings = options_of(self.command.model)
        return {name: value for name, value in self.options.items() if not meanings[name].same_bytes}

    def bound(self, given: list[str], options: Mapping[str, Any], **more: Any) -> Options:
        """Return the command's options with these arguments and options, and those of `more` that the command has."""
        model = self.command.model
        first = _argument(model)
        words = given if plain_type(model.model_fields[first]) == list[str] else given[0]
        known = {name: value for name, value in more.items() if name in model.model_fields}
        return model.of(**{first: words}, **options, **known)


def read_steps(table: Mapping[str, Any], file: Path) -> list[Step]:
    """Return the steps of a recipe's table, checked.

    Raises:
        InputError: an unknown command or option, a value of a wrong type, or two steps of one name.
    """
    steps: list[Step] = []
    for index, given in enumerate(parse(Recipe, table, file).steps):
        step = _step(given, f"steps.{index}", file, [one.name for one in steps])
        if step.name in {one.name for one in steps}:
            raise InputError(f"two steps are called '{step.name}'", file=file, remedy="give each a name of its own")
        steps.append(step)
    if not steps:
        raise InputError("the recipe has no steps", file=file, remedy="see docs/recipes.md")
    return steps


def commands() -> dict[str, Command]:
    """Return the installed commands that can be steps, by name; those that fail to load are left out."""
    found = {}
    for name, point in command_points().items():
        try:
            command = load_command(point)
        except UsageError:
            continue
        if command.makes is not None:
            found[name] = command
    return found


def _step(given: Mapping[str, Any], where: str, file: Path, taken: list[str]) -> Step:
    known = commands()
    words = [key for key in given if key in known]
    if len(words) != 1:
        unknown = next((key for key in given if key not in _ABOUT), "")
        remedy = "a step has one command" if words else did_you_mean(unknown, known)
        raise InputError(f"{where}: {' and '.join(words) or 'no command'}", file=file, remedy=remedy)
    word = words[0]
    command = known[word].chosen({name: value for name, value in given.items() if name == "method"})
    with in_recipe(file, where):
        checked: BaseModel = parse(_schema(command), given, file, where)
    inputs, fail_if = getattr(checked, word), getattr(checked, "fail_if", None) or []
    spelled = {meaning.recipe or name: name for name, meaning in options_of(command.model).items()}
    options = {
        spelled[key]: value
        for key, value in checked
        if key in checked.model_fields_set - _ABOUT - {word} and value is not None
    }
    name = getattr(checked, "name", None) or _free(word, taken)
    if not _NAME.fullmatch(name) or name == Path(STATE).stem:
        raise InputError(
            f"{where}: '{name}' is no name for a step", file=file, remedy="letters, digits, - and _, up to 100"
        )
    step = Step(name, command, [str(one) for one in inputs] if isinstance(inputs, list) else [str(inputs)], options, [])
    with in_recipe(file, f"{where}.fail_if"):
        gates = [parse_gate(text) for text in ([fail_if] if isinstance(fail_if, str) else fail_if)]
        if gates and command.numbers is not None:
            numbers = command.load(command.numbers)(step.bound(step.given, options))
            for gate in gates:
                gate.check_names(numbers)
    return Step(step.name, command, step.given, options, gates)


def _free(command: str, taken: list[str]) -> str:
    names = [command, *(f"{command}-{number}" for number in range(2, len(taken) + 2))]
    return next(name for name in names if name not in taken)


def _argument(model: type[Options]) -> str:
    """Return the name of what comes after the command."""
    return next(name for name, meaning in options_of(model).items() if meaning.argument)


@cache
def _schema(command: Command) -> type[BaseModel]:
    """Return the pydantic model of a step: the command's argument, a name, gates, and the command's options."""
    model, first = command.model, _argument(command.model)
    many = plain_type(model.model_fields[first]) == list[str]
    fields: dict[str, Any] = {command.name: (list[str] if many else str, ...), "name": (str | None, None)}
    if "fail_if" in command.terminal:
        fields["fail_if"] = (str | list[str] | None, None)
    for name, meaning in options_of(model).items():
        if name in (first, "output") or meaning.not_in_recipes:
            continue
        field = copy(model.model_fields[name])
        kind: Any = field.annotation
        kind = Annotated[kind if field.is_required() else kind | None, *field.metadata]
        if meaning.recipe is not None:
            field.validation_alias = None
        fields[meaning.recipe or name] = (kind, field)
    return create_model(f"{command.name}_step", __config__=ConfigDict(extra="forbid", frozen=True), **fields)
