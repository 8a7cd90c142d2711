"""What every run does around its work: open the partial output, and leave it as it should be left."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from basiscli.checkpoints.layout import Layout
from basiscli.checkpoints.writer import PartialOutput
from basiscli.engine.pricing import Price
from basiscli.engine.rates import MEASURED, Rates
from basiscli.errors import InputError
from basiscli.progress import Progress
from basiscli.version import __version__


class Plan(Protocol):
    """What a plan of any command has."""

    @property
    def out(self) -> Path:
        """The folder to make."""

    @property
    def layout(self) -> Layout:
        """Its weights."""

    @property
    def fingerprint(self) -> str:
        """Digest of everything that decides the result."""

    @property
    def notes(self) -> list[str]:
        """What the report says besides; a run may add to it."""

    def price(self, rates: Rates = MEASURED) -> Price | None:
        """Return what it would take at these rates; None where nobody can tell before the work."""

    def close(self) -> None:
        """Close the inputs."""


def fingerprint_of(files: Iterable[Path], facts: Sequence[Any]) -> str:
    """Return a digest of inputs (by path, size and time of change) and of everything else that decides a result."""
    stamps = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(json.dumps([__version__, stamps, *facts]).encode()).hexdigest()


@contextmanager
def partial_output(plan: Plan, progress: Progress, *, resume: bool) -> Iterator[PartialOutput]:
    """Take up or begin a plan's partial output; bad input removes it, any other end keeps what is done."""
    output = PartialOutput(plan.out, plan.layout, plan.fingerprint, resume=resume)
    try:
        yield output
    except InputError:
        output.discard()  # the same command would fail again: there is nothing to go on with
        raise
    finally:
        progress.stop()
        output.close()
        plan.close()
