"""Shell completion of option values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from basiscli.cli.fields import Completion
    from basiscli.transforms import Family


def dtypes(given: Mapping[str, Any]) -> Iterable[str]:
    """Return the values of `--dtype`."""
    return ("f32", "bf16", "f16")


def methods_of(family: Family, *others: str) -> Completion:
    """Return a completion of a family's method names and further words."""

    def complete(given: Mapping[str, Any]) -> Iterable[str]:
        from basiscli.registry import Registry

        return [*Registry.with_files(_files(given)).names(family), *others]

    return complete


def parameters_of(family: Family) -> Completion:
    """Return a completion of `name=` for the parameters of the method on the command line."""

    def complete(given: Mapping[str, Any]) -> Iterable[str]:
        from basiscli.registry import Registry

        method = given.get("method")
        if method is None:
            return []
        found = Registry.with_files(_files(given)).find(family, method)
        return [f"{field.alias or name}=" for name, field in found.parameters.model_fields.items()]

    return complete


def _files(given: Mapping[str, Any]) -> list[Path]:
    return list(given.get("plugins") or ())
