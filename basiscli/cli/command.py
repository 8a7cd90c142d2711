"""Declarations of commands: name, options, and functions that plan, run and show them.

`commands/X/__init__.py` holds one, and any package can have one under the entry-point group `basis.command`. From it
come the command line, the Python function's keywords, the step of a recipe, `--save-recipe`, the docs' option tables
and the price in `--dry-run`.

References are imported when they are used, so that `basis --help` can read all declarations and import next to
nothing. A reference is the object itself or a string `module:name`; a module that begins with a point is relative to
the declaring package.
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
"""Fields of `Terminal` of a command that prints a result."""
MAKES_MODEL = ("dry_run", "fail_if", "push_to", "private", "create_pr", "save_recipe", *SHOWS, "config")
"""Fields of `Terminal` of a command that writes a model and a report."""


@dataclass(frozen=True)
class OwnMethod:
    """A method that is built into a command and is not a plugin; `basis methods` lists both."""

    name: str
    doc: str
    source: str
    usage: str = ""
    """Words after `basis` that use it; by default the command's name."""

    @property
    def summary(self) -> str:
        """The first line of its documentation."""
        return self.doc.partition("\n")[0]

    def as_dict(self, command: str) -> dict[str, Any]:
        """Return plain data in the form of a plugin's method, for `basis methods --json`."""
        return {
            "command": command, "name": self.name, "doc": self.doc, "source": self.source, "needs_base": False,
            "takes_weights": False, "parameters": {},
        }  # fmt: skip


@dataclass(frozen=True)
class Command:
    """One command of `basis`.

        command = Command(
            name="norms",
            help="Print the largest norms of a checkpoint.",
            package=__name__,
            options=".options:NormsOptions",
            main=".cli:main",  # (options, session) → None
        )

    A command that writes a model has `plan`, `run` and `view` instead of `main`.
    """

    name: str
    help: str
    """In Markdown; the first sentence is its line in `basis --help`."""
    package: str
    """`__name__` of the declaring package."""
    options: Any
    """Reference to its options, a subclass of `Options`."""
    run: Any = None
    """Reference to a function (plan, progress) → result; without `plan`, (options, progress) → result."""
    plan: Any = None
    """Reference to a function options → plan, which writes nothing and imports no torch; the plan may have a price."""
    view: Any = None
    """Reference to a `View`, which shows plan and result at the terminal."""
    page: Any = None
    """Reference to a `reports.contribution.Contributor`, which returns the parts that only its reports have."""
    main: Any = None
    """Reference to a function (options, session) → None that runs and shows everything, in place of plan and view."""
    group: Any = None
    """Reference to a function that returns a Typer application, for a command with sub-commands."""
    terminal: Sequence[str] = SHOWS
    """Fields of `Terminal` that the command has."""
    makes: Literal["model", "figures", "commit"] | None = None
    """Output of the command as a recipe's step: a folder, numbers, or a commit on the Hub; None if it cannot be one."""
    numbers: Any = None
    """Reference to a function options → names of the numbers that gates may use, known before the run."""
    variant: Any = None
    """Reference to a function given options → Command, where one name stands for several commands (`compress`)."""
    own_methods: Sequence[OwnMethod] = ()
    """Its built-in methods."""
    position: int = 100
    """Sort key in `basis --help`."""

    def __post_init__(self) -> None:
        for name in ("terminal", "own_methods"):  # a list has no hash
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def load(self, reference: Any) -> Any:
        """Return the object that a reference of this declaration names, importing its module."""
        if not isinstance(reference, str):
            return reference
        module, _, name = reference.partition(":")
        return getattr(import_module(module, self.package), name)

    @cached_property
    def model(self) -> type[Options]:
        """The class of its options, imported."""
        found: type[Options] = self.load(self.options)
        return found

    def chosen(self, given: Mapping[str, Any]) -> Command:
        """Return the command for the given options by name: this one, or its variant."""
        return self if self.variant is None else self.load(self.variant)(given)

    def do(self, options: Options, progress: Any) -> Any:
        """Run the command with these options and return its result."""
        run = self.load(self.run)
        if self.plan is None:
            return run(options, progress)
        return run(self.load(self.plan)(options), progress)

    def planned(self, options: Options) -> Any:
        """Return the plan of a run with these options."""
        return self.load(self.plan)(options)


def command_points() -> dict[str, EntryPoint]:
    """Return the entry points of the installed commands by name, without loading any.

    Raises:
        UsageError: two packages declare the same name.
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
    """Return the command that an entry point declares.

    Raises:
        UsageError: the package fails to load, or the object is not a `Command` of that name.
    """
    from basiscli.errors import UsageError

    owner = _owner(point)
    try:
        found = point.load()
    except (Exception, SystemExit) as error:  # a stranger's module may fail in any way
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
    """Return the installed command of a name.

    Raises:
        UsageError: there is none, or it fails to load.
    """
    from basiscli.errors import UsageError, did_you_mean

    points = command_points()
    if name not in points:
        raise UsageError(f"no command '{name}'", remedy=did_you_mean(name, points))
    return load_command(points[name])


def _owner(point: EntryPoint) -> str:
    return point.dist.name if point.dist else point.value
