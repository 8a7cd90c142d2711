"""Print the test files that a change touches, nearest first, as many as run in the time there is for them.

Nearest are changed tests and those named for a changed file, then what imports or names it, then what imports these.
`make check` runs them: what differs from the commit that is given (or else HEAD) is a change, and what git has not yet.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
FOLDERS = ("basiscli", "plugins", "tests", "tools", "benchmarks")
TIMES = ROOT / ".cache" / "tests" / "times.xml"  # of the last `make test`
SECONDS = 60.0  # for the tests of each process: with ruff, mypy and the start of pytest less than two minutes
UNKNOWN = 15.0  # seconds of a file that has not run yet


def changed(since: str) -> list[Path]:
    """Return the files that differ from a commit, or are not in git yet."""
    commands = (["diff", "--name-only", since], ["ls-files", "--others", "--exclude-standard"])
    said = [subprocess.check_output(["git", *words], cwd=ROOT, text=True) for words in commands]
    return sorted({ROOT / name for text in said for name in text.splitlines()})


def module_name(file: Path) -> str:
    """Return what a file is imported as."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[1:] if parts[0] == "plugins" else parts).removesuffix(".__init__")


def uses(text: str, modules: dict[str, Path]) -> set[Path]:
    """Return the modules that Python code imports, anywhere in it, or names in a string."""
    names: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names += re.findall(r"(?:basiscli|basis_plugins)[.\w]+", node.value)
    known = set()
    for name in names:
        while name and name not in modules:
            name = name.rpartition(".")[0]
        known.add(name)
    return {modules[name] for name in known if name}


def names_it(text: str, file: Path) -> bool:
    """Whether code names a file that nothing imports: one that is not Python, or a method."""
    if file.suffix == ".py":
        return "basis_plugins" in file.parts and f'"{file.stem}"' in text
    return file.name in text or any(f'"{part}"' in text for part in {*file.relative_to(ROOT).parts} - {*FOLDERS})


def distances(changes: list[Path]) -> dict[Path, int]:
    """Return how far each file is from what changed."""
    texts = {file: file.read_text() for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")}
    modules = {module_name(file): file for file in texts}
    used = {file: uses(text, modules) for file, text in texts.items()}
    for file in texts:
        if file.name.startswith("test_"):
            used[file] |= {near for folder in file.parents if (near := folder / "conftest.py") in texts}
    named = {f"test_{one.stem}" for one in changes}
    found = dict.fromkeys([*changes, *(file for file in texts if file.stem in named)], 0)
    edge = [(f, 1) for f, text in texts.items() if used[f] & {*changes} or any(names_it(text, one) for one in changes)]
    while edge:
        fresh = {file: far for file, far in edge if file not in found}
        found |= fresh
        edge = [(file, far + 1) for other, far in fresh.items() for file in texts if other in used[file]]
    return found


def seconds() -> Counter[str]:
    """Return how long each test file took when all ran."""
    taken = Counter[str]()
    for case in ElementTree.parse(TIMES).iter("testcase") if TIMES.is_file() else ():
        taken[case.get("classname", "")] += float(case.get("time", 0))
    return taken


if __name__ == "__main__":
    far, taken = distances(changed(*sys.argv[1:] or ["HEAD"])), seconds()
    tests = [file for file in far if file.name.startswith("test_") and file.is_file()]
    lasts = {file: taken.get(module_name(file), UNKNOWN) for file in tests}
    left, chosen = SECONDS * (os.cpu_count() or 1), list[str]()
    for test in sorted(tests, key=lambda file: (far[file], lasts[file])):
        if lasts[test] <= left or not far[test]:
            left -= lasts[test]
            chosen.append(f"{test.relative_to(ROOT)}\n")
    sys.stdout.writelines(chosen)
    sys.stderr.write(f"{len(chosen)} of the {len(tests)} test files that the change touches; `make test` runs all\n")
