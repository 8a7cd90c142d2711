"""Print the test files that a change touches, nearest first, as many as run in the time there is for them.

Nearest are changed tests and those named for a changed file, then what imports or names it, then what imports these.
`make check` runs what this prints; the seconds of a file are those of the last `make test`.

    python tools/touched.py [COMMIT]    for what differs from COMMIT (or else HEAD), or is not in git yet
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
TIMES = ROOT / ".cache" / "tests" / "times.xml"
SECONDS = 60.0  # for the tests of each process: with ruff, mypy and the start of pytest less than two minutes
UNKNOWN = 5.0  # seconds of a file that has not run yet


def changed(since: str) -> list[Path]:
    """Return the files that differ from a commit, or are not in git yet."""
    found: set[str] = set()
    for words in (["diff", "--name-only", since], ["ls-files", "--others", "--exclude-standard"]):
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
        found.update(done.stdout.splitlines())
    return [ROOT / name for name in sorted(found)]


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
    found = set()
    for name in names:
        while name and name not in modules:
            name = name.rpartition(".")[0]
        found.add(name)
    return {modules[name] for name in found if name}


def names_it(text: str, file: Path) -> bool:
    """Whether code names a file that nothing imports: one that is not Python, or a method."""
    if file.suffix == ".py":
        return "basis_plugins" in file.parts and f'"{file.stem}"' in text
    parts = {*file.relative_to(ROOT).parts} - {*FOLDERS}
    return file.name in text or any(f'"{part}"' in text for part in parts)


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
    edge = [(file, 1) for file, text in texts.items() if any(names_it(text, one) for one in changes)]
    edge += [(file, 1) for file in texts if used[file] & set(changes)]
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
    left, chosen = SECONDS * (os.cpu_count() or 1), []
    for test in sorted(tests, key=lambda file: (far[file], lasts[file])):
        if lasts[test] <= left or not far[test]:
            left -= lasts[test]
            chosen.append(str(test.relative_to(ROOT)))
    sys.stdout.write("".join(f"{name}\n" for name in chosen))
    sys.stderr.write(f"{len(chosen)} of the {len(tests)} test files that the change touches; `make test` runs all\n")
