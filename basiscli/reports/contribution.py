"""What a command adds to the sections that all reports have: its part of the page and of the card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from basiscli.reports.blocks import Block, Section
from basiscli.reports.evaluations import EvaluationRecord
from basiscli.reports.schema import CalibrationRecord, Report


@dataclass(frozen=True)
class Contribution:
    """A command's own part of a report, as plain data; what is left out is not shown."""

    summary: str = ""
    """What was done, in a sentence or two. Without it, the report names its command and method."""
    tiles: tuple[tuple[str, str], ...] = ()
    """Numbers to be seen first, before those of every report: (label, value)."""
    calibration: CalibrationRecord | None = None
    """The text that went in beside the models."""
    settings: tuple[tuple[str, str], ...] = ()
    """What was set beside the method's own parameters: (name, value)."""
    comparison: tuple[Block, ...] = ()
    """What the evaluations show together, below the table of each."""
    sections: tuple[Section, ...] = ()
    """Between the evaluations and the cost, in this order; one without blocks is left out."""


Contributor = Callable[[Report, Sequence[EvaluationRecord]], Contribution]
"""From a report of a command, and the evaluations shown with it, to the command's part."""
