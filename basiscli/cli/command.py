"""A command, declared once: its name, its options, what it plans, runs and shows.

`commands/X/__init__.py` holds such a declaration, and a package of anybody's can have one under the entry-point group
`basis.command`. From it come the command line, the Python function's keywords, the step of a recipe, `--save-recipe`,
the docs' option tables and the price in `--dry-run`.

What a declaration names is loaded when it is used, so that `basis --help` can read all of them and import next to
nothing: a reference is the object itself, or its place, `module:name`, where a module that begins with a point is one
of the declaration's own package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from basiscli.cli.fields import Options

GROUP = "basis.command"
SHOWS = ("progress", "as_json", "quiet")
"""What a command that shows something at the terminal is told about it."""
MAKES_MODEL = ("dry_run", "fail_if", "push_to", "private", "create_pr", "save_recipe", *SHOWS, "config")
"""What a command is told that writes a model and a report."""


@dataclass(frozen=True)
class OwnMethod:
    """A method that a command has built in, beside those that plugins bring; `basis methods` lists both."""

    name: str
    doc: str
    source: str
    usage: str = ""
    """What follows `basis` to use it; the command's name by default."""

    @property
    def summary(self) -> str:
        """The first line of its documentation."""
        return self.doc.partition("\n")[0]

    def as_dict(self, command: str) -> dict[str, Any]:
        """Return it as plain data, like a plugin's method."""
        return {
            "command": command, "name": self.name, "doc": self.doc, "source": self.source, "needs_base": False,
            "takes_weights": False, "parameters": {},
        }  # fmt: skip


@dataclass(frozen=True)
class Command:
    """One command of `basis`."""

    name: str
    help: str
    """In Markdown; the first sentence is its line in `basis --help`."""
    package: str
    """`__name__` of the declaring package."""
    options: Any
    """Reference to its model of options, a subclass of `Options`."""
    run: Any = None
    """Reference to what does it: a function (plan, progress) → result, without `plan` (options, progress) → result."""
    plan: Any = None
    """Reference to a function options → plan, which writes nothing and imports no torch; the plan may have a price."""
    view: Any = None
    """Reference to a `View`: what the terminal shows of plan and result."""
    page: Any = None
    """Reference to a `reports.contribution.Contributor`: what its reports have beside what all have."""
    main: Any = None
    """Reference to a function (options, session) → None, for what is not shown in the usual way."""
    group: Any = None
    """Reference to what makes a Typer application, for a command with commands of its own, which shows everything."""
    terminal: Sequence[str] = SHOWS
    """Fields of `Terminal` that the command has."""
    makes: Literal["model", "figures", "commit"] | None = None
    """What a step of a recipe leaves: a folder, numbers, or a commit on the Hub; None where it is no step."""
    numbers: Any = None
    """Reference to a function options → names of the numbers that gates can be over, known before the work."""
    variant: Any = None
    """Reference to a function from given options to the command that does these, where a word stands for several."""
    own_methods: Sequence[OwnMethod] = ()
    """Methods that it has built in."""
    position: int = 100
    """Its place in `basis --help`."""

    def load(self, reference: Any) -> Any:
        """Return what a reference stands for."""
        if not isinstance(reference, str):
            return reference
        module, _, name = reference.partition(":")
        return getattr(import_module(module, self.package), name)

    @cached_property
    def model(self) -> type[Options]:
        """Its options."""
        found: type[Options] = self.load(self.options)
        return found

    def chosen(self, given: Mapping[str, Any]) -> Command:
        """Return the command that does what was given: this one, or its variant for that."""
        return self if self.variant is None else self.load(self.variant)(given)

    def do(self, options: Options, progress: Any) -> Any:
        """Do what the options ask for, and return what came of it."""
        run = self.load(self.run)
        if self.plan is None:
            return run(options, progress)
        return run(self.load(self.plan)(options), progress)

    def planned(self, options: Options) -> Any:
        """Return the plan of what the options ask for."""
        return self.load(self.plan)(options)


def command_points() -> dict[str, EntryPoint]:
    """Return where the installed commands are declared, by name, without loading any.

    Raises:
        UsageError: two packages declare one name.
    """
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        other = found.get(point.name)
        if other is not None and other.value != point.value:  # an editable install may list one twice
            from basiscli.errors import UsageError

            raise UsageError(
                f"command '{point.name}' is declared by {_owner(other)} and by {_owner(point)}", remedy="uninstall one"
            )
        found[point.name] = point
    return found


def load_command(point: EntryPoint) -> Command:
    """Return a command that is declared somewhere.

    Raises:
        UsageError: its package does not load, or declares no command there.
    """
    from basiscli.errors import UsageError

    owner = _owner(point)
    try:
        found = point.load()
    except Exception as error:  # a stranger's module may fail in any way
        raise UsageError(
            f"command '{point.name}' of {owner} does not load: {type(error).__name__}: {error}",
            remedy=f"update or uninstall {owner}",
        ) from error
    if not isinstance(found, Command) or found.name != point.name:
        raise UsageError(
            f"{point.value} of {owner} is no declaration of a command '{point.name}'",
            remedy="a `basiscli.cli.command.Command` of that name belongs there",
        )
    return found


def find_command(name: str) -> Command:
    """Return the command of a name.

    Raises:
        UsageError: there is none.
    """
    from basiscli.errors import UsageError, did_you_mean

    points = command_points()
    if name not in points:
        raise UsageError(f"no command '{name}'", remedy=did_you_mean(name, points))
    return load_command(points[name])


def _owner(point: EntryPoint) -> str:
    return point.dist.name if point.dist else point.value
