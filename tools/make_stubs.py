"""Write `basiscli/__init__.pyi`: `python tools/make_stubs.py`.

Type checkers and editors see the keywords of the Python functions there; at run time they are made of the commands'
declarations. A test compares the file with the code.
"""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import typing
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import basiscli

FILE = Path(basiscli.__file__).with_suffix(".pyi")
_HEAD = '''"""The public Python API, with every keyword; made by tools/make_stubs.py."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

'''
_NAMES = {
    None: "None",
    str: "str",
    int: "int",
    float: "float",
    bool: "bool",
    Path: "str | Path",
    NoneType: "None",
    Any: "Any",
}


def stub() -> str:
    """Return the text of the stub."""
    homes: dict[str, set[str]] = {}
    functions = []
    for name in basiscli.__all__:
        found = getattr(basiscli, name)
        if name == "__version__":
            homes.setdefault("basiscli.version", set()).add(name)
        elif inspect.isfunction(found) and "__signature__" in vars(found):
            functions.append(_function(found, homes))
        else:
            homes.setdefault(basiscli._HOME_OF[name], set()).add(name)
    imports = [f"from {home} import {', '.join(f'{n} as {n}' for n in sorted(names))}" for home, names in homes.items()]
    return _HEAD + "\n".join(sorted(imports)) + "\n\n" + "\n\n".join(functions) + "\n"


def _function(function: Any, homes: dict[str, set[str]]) -> str:
    """Return a function with all its keywords, and note where the classes that it names are from."""
    hints = typing.get_type_hints(function, localns=_imported(function), include_extras=True)
    parameters, starred = [], False
    for name, parameter in function.__signature__.parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not starred:
            parameters.append("*")
            starred = True
        kind = _text(hints.get(name, parameter.annotation), homes)
        default = "" if parameter.default is inspect.Parameter.empty else " = ..."
        parameters.append(f"{name}: {kind}{default}")
    return f"def {function.__name__}({', '.join(parameters)}) -> {_text(hints['return'], homes)}: ..."


def _imported(function: Any) -> dict[str, Any]:
    """Return what the function's file imports by name, for types alone, too."""
    module = sys.modules[function.__module__]
    imports = (node for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.ImportFrom))
    return {
        alias.asname or alias.name: getattr(import_module(node.module), alias.name)
        for node in imports
        if node.module and node.module.startswith("basiscli")
        for alias in node.names
    }


def _text(kind: Any, homes: dict[str, set[str]]) -> str:
    """Return a type as a stub writes it: what a function takes, which is more than what it makes of it."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        taken = "str | Path" if arguments[0] is str else None  # a name of a model or a file, all of them
        return taken or _text(arguments[0], homes)
    if origin in (Union, UnionType):
        words = [word for one in arguments for word in _text(one, homes).split(" | ")]
        return " | ".join(dict.fromkeys(words))
    if origin is Literal:
        return f"Literal[{', '.join(map(repr, arguments))}]"
    if origin is not None:
        outer = {list: "Sequence", dict: "Mapping"}.get(origin, origin.__name__)
        if origin.__name__ == "Callable":
            taken, given = arguments
            return f"Callable[[{', '.join(_text(one, homes) for one in taken)}], {_text(given, homes)}]"
        return f"{outer}[{', '.join(_text(one, homes) for one in arguments)}]"
    if kind in _NAMES:
        return _NAMES[kind]
    home = basiscli._HOME_OF.get(kind.__name__, kind.__module__)
    homes.setdefault(home, set()).add(kind.__name__)
    return str(kind.__name__)


def main() -> None:
    """Write the stub, formatted."""
    FILE.write_text(stub(), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "ruff", "check", "--fix", "--quiet", "--select", "I,F", FILE], check=True)
    subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", FILE], check=True)


if __name__ == "__main__":
    main()
