"""The record of a pipeline's finished steps: for each a digest of its inputs and options, and of its result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from basiscli.checkpoints.digests import file_digest
from basiscli.checkpoints.files import REPORT
from basiscli.version import __version__

STATE = "basis_pipeline.json"
_CARD = "README.md"


class Entry(BaseModel):
    """The record of one step; without a key it was begun and not finished."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")  # JSON has no numbers for NaN and Inf

    key: str | None = None
    """Digest of its options and of its inputs' contents; see `Pipeline.key`."""
    content: str | None = None
    """Digest of its result; see `State.content`."""
    numbers: dict[str, float] = {}
    url: str | None = None
    """Of a push."""


@dataclass
class State:
    """The record of all steps, in `basis_pipeline.json` beside their results. Contents are compared, not times."""

    folder: Path
    steps: dict[str, Entry] = field(default_factory=dict)
    _digests: dict[str, list[Any]] = field(default_factory=dict)
    """Of files by path: size, time of change and SHA-256, so that an unchanged file is not read again."""

    @classmethod
    def read(cls, folder: Path) -> State:
        """Return the record of an earlier run in this folder; an empty one where there is none or it is damaged."""
        try:
            stored = json.loads((folder / STATE).read_text())
            steps = {str(name): Entry.model_validate(entry) for name, entry in stored["steps"].items()}
            digests = {
                str(file): [int(size), int(time), str(sha)] for file, (size, time, sha) in stored["digests"].items()
            }
            return cls(folder, steps, digests)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return cls(folder)

    def write(self) -> None:
        """Write the record to its file, atomically."""
        self.folder.mkdir(parents=True, exist_ok=True)
        steps = {name: json.loads(entry.model_dump_json()) for name, entry in self.steps.items()}
        document = {"version": __version__, "steps": steps, "digests": self._digests}
        partial = self.folder / f"{STATE}.partial"
        partial.write_text(json.dumps(document, indent=1))
        partial.replace(self.folder / STATE)

    def content(self, path: Path) -> str:
        """Return a digest of a file, or of all files of a folder but hidden ones and its report and card.

        Report and card hold times, which differ when the same result is made again.
        """
        if path.is_file():
            return self._digest(path)
        found = {}
        for file in sorted(path.rglob("*")):
            inside = file.relative_to(path)
            hidden = any(part.startswith(".") for part in inside.parts)
            if file.is_file() and not hidden and file.name not in {REPORT, _CARD}:
                found[str(inside)] = self._digest(file)
        return digest_of(found)

    def is_done(self, name: str, key: str, path: Path | None) -> bool:
        """Return whether a step was done with this key, and its result at `path` is unchanged since."""
        entry = self.steps.get(name)
        if entry is None or entry.key != key:
            return False
        return path is None or (path.exists() and self.content(path) == entry.content)

    def begin(self, name: str) -> None:
        """Record that a step has begun, so that a later run may replace its unfinished result."""
        self.steps[name] = Entry()
        self.write()

    def record(self, name: str, key: str, path: Path | None, numbers: Mapping[str, float], url: str | None) -> None:
        """Record that a step is done: the digest of its result at `path`, its numbers, the URL of a push."""
        content = None if path is None else self.content(path)
        self.steps[name] = Entry(key=key, content=content, numbers=dict(numbers), url=url)
        self.write()

    def _digest(self, file: Path) -> str:
        file = file.resolve()
        stat = file.stat()
        known = self._digests.get(str(file))
        if known is None or known[:2] != [stat.st_size, stat.st_mtime_ns]:
            known = [stat.st_size, stat.st_mtime_ns, file_digest(file)]
            self._digests[str(file)] = known
        return str(known[2])


def digest_of(facts: Any) -> str:
    """Return the SHA-256 of plain data as sorted JSON."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
