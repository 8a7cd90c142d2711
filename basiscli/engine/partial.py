"""The partial output of a run: opened or resumed, kept after an interruption, removed after bad input."""

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
    """What the plan of every command that writes an output has."""

    @property
    def out(self) -> Path:
        """The output folder."""

    @property
    def layout(self) -> Layout:
        """Which tensors the output's weight files hold: names, dtypes, shapes and files."""

    @property
    def fingerprint(self) -> str:
        """Digest of all that the result depends on; an interrupted run is resumed only if it is the same."""

    @property
    def notes(self) -> list[str]:
        """Notes for the report; a run may add to them."""

    def price(self, rates: Rates = MEASURED) -> Price | None:
        """Return the bytes, operations and seconds of the run at these rates; None where they depend on the data."""

    def close(self) -> None:
        """Close the input files."""


def fingerprint_of(files: Iterable[Path], facts: Sequence[Any]) -> str:
    """Return the SHA-256 of input files (by path, size and modification time), the version of basis, and further facts.

    Args:
        files: the inputs.
        facts: everything else that the result depends on, such as the method and its parameters; JSON.
    """
    stamps = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(json.dumps([__version__, stamps, *facts]).encode()).hexdigest()


@contextmanager
def partial_output(plan: Plan, progress: Progress, *, resume: bool) -> Iterator[PartialOutput]:
    """Open a plan's partial output, resuming an interrupted run's if allowed, and close it and the plan's inputs.

    An `InputError` in the block removes the partial output, any other error keeps it for the next run.

        with partial_output(plan, progress, resume=True) as output:
            output.write(name, tensor, 0)
    """
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
