"""The walls of the house: what may import what, no circles of files, and no file that does not fit in a head."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the top down; a room may import from those below it and from itself. `app` puts the commands together.
ROOMS = (
    ("app", "__main__"),
    ("commands",),
    ("cli",),
    ("reports",),
    ("model",),
    ("engine",),
    ("runtime", "calibration"),
    ("hub",),
    ("checkpoints",),
    ("linalg",),
    ("transforms", "registry", "gates", "progress"),
    ("names", "errors", "version"),
)
HEIGHT = {room: height for height, rooms in enumerate(reversed(ROOMS)) for room in rooms}
MOST_LINES = 300


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(file): file for file in sorted((ROOT / "basiscli").rglob("*.py"))}


def imports(module: str, *, types: bool) -> Iterator[str]:
    """Yield the modules of ours that a module imports, at its top or later; those for types alone if asked for."""
    tree = ast.parse(MODULES[module].read_text())
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in for_types and not types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found = full if full in MODULES else node.module
                if found in MODULES and found not in {"basiscli", module}:
                    yield found


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "basiscli"


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"basiscli"}))
def test_imports_go_downwards(module: str) -> None:
    """Types are free to come from above: the contracts name what the core hands them."""
    above = [found for found in imports(module, types=False) if HEIGHT[room(found)] > HEIGHT[room(module)]]
    assert not above
    beside = {
        found
        for found in imports(module, types=False)
        if HEIGHT[room(found)] == HEIGHT[room(module)] and room(found) != room(module)
    }
    assert not {room(found) for found in beside} & {"runtime", "calibration"}


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m.startswith("basiscli.commands.")))
def test_a_command_knows_others_by_their_api_and_declaration(module: str) -> None:
    own = ".".join(module.split(".")[:3])
    others = [
        found
        for found in imports(module, types=False)
        if room(found) == "commands" and found != "basiscli.commands" and not f"{found}.".startswith(f"{own}.")
    ]
    declarations = {found for found in others if found.count(".") == 2}  # `commands/X/__init__.py`
    assert all(found.endswith(".api") for found in set(others) - declarations), others


def test_no_files_import_each_other_in_a_circle() -> None:
    """Those that are only for types count, too: they tie files together for whoever reads them."""
    graph = {module: set(imports(module, types=True)) for module in MODULES if module != "basiscli"}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


@pytest.mark.parametrize("folder", ["basiscli", "plugins"])
def test_a_file_fits_in_a_head(folder: str) -> None:
    lines = {file: len(file.read_text().splitlines()) for file in (ROOT / folder).rglob("*.py")}
    assert not {str(file.relative_to(ROOT)): count for file, count in lines.items() if count > MOST_LINES}
