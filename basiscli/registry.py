"""Finding methods: entry points of installed packages, and Python files given with `--plugin`."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from basiscli.errors import UsageError, did_you_mean
from basiscli.transforms import Family, Method

FAMILIES: tuple[Family, ...] = ("merge", "init", "compress")


@dataclass
class Registry:
    """The installed methods by family and name, and those of plugin files; each is loaded when it is asked for.

        registry = Registry.with_files([Path("mean.py")])
        registry.names("merge")  # ["dare_linear", …, "mean", …]
        method = registry.find("merge", "ties")

    Families are `merge`, `init` and `compress`.
    """

    from_files: dict[tuple[str, str], tuple[Method, Path]] = field(default_factory=dict)
    """(method, its file) by (family, name)."""

    @classmethod
    def with_files(cls, files: list[Path]) -> Registry:
        """Return a registry of the installed methods and those in Python files, which are run.

        Raises:
            UsageError: a file does not load or defines no method.
        """
        registry = cls()
        for file in files:
            for method in _methods_of_file(file):
                registry.from_files[method.family, method.name] = (method, file)
        return registry

    def names(self, family: Family) -> list[str]:
        """Return the names of a family's methods, sorted, without loading any."""
        own = [name for kind, name in self.from_files if kind == family]
        return sorted({*own, *(point.name for point in entry_points(group=f"basis.{family}"))})

    def find(self, family: Family, name: str) -> Method:
        """Return a method of a family by name.

        Raises:
            UsageError: it is unknown, defined by two packages, or its package does not load.
        """
        points = _distinct(name, [p for p in entry_points(group=f"basis.{family}") if p.name == name])
        given = self.from_files.get((family, name))
        if len(points) + (given is not None) > 1:
            owners = [p.dist.name if p.dist else p.value for p in points] + ([str(given[1])] if given else [])
            raise UsageError(f"{family} method '{name}' is defined by {' and by '.join(owners)}", remedy="remove one")
        if given:
            return given[0]
        if not points:
            raise UsageError(f"no {family} method '{name}'", remedy=did_you_mean(name, self.names(family)))
        return _load(points[0])


def _distinct(name: str, points: list[EntryPoint]) -> list[EntryPoint]:
    """Drop repetitions: an editable install can list one package's entry point twice."""
    return list({(point.dist.name if point.dist else "", point.value): point for point in points}.values())


def _load(point: EntryPoint) -> Method:
    owner = point.dist.name if point.dist else point.value
    try:
        method = getattr(point.load(), "basis_method", None)
    except Exception as error:  # a stranger's module may fail in any way
        raise UsageError(
            f"plugin '{point.name}' of {owner} does not load: {type(error).__name__}: {error}",
            remedy=f"update or uninstall {owner}",
        ) from error
    if not isinstance(method, Method):
        raise UsageError(
            f"plugin '{point.name}' of {owner} is no transform",
            remedy="decorate it with @basiscli.transform(...)",
        )
    return method


def _methods_of_file(file: Path) -> list[Method]:
    spec = importlib.util.spec_from_file_location(f"basis_plugin_{file.stem}", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise UsageError("not a Python file", file=file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's file may fail in any way
        raise UsageError(f"the plugin does not load: {type(error).__name__}: {error}", file=file) from error
    methods = [getattr(value, "basis_method", None) for value in vars(module).values()]
    found = [
        method for method in methods if isinstance(method, Method) and method.implementation.__module__ == spec.name
    ]
    if not found:
        raise UsageError(
            "the file defines no transform", file=file, remedy="decorate one with @basiscli.transform(...)"
        )
    return found
