"""What every run does around its work: open the partial output, and leave it as it should be left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from basiscli.checkpoints.layout import Layout
from basiscli.checkpoints.writer import PartialOutput
from basiscli.engine.local import Progress
from basiscli.errors import InputError


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

    def close(self) -> None:
        """Close the inputs."""


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
