"""What shows how far a run is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    pass


class Progress(Protocol):
    """What shows how far a run is."""

    def start(self, what: str, tasks: int, size: int, unit: str = "bytes") -> None:
        """Begin a pass of so many tasks, and bytes (or another unit) in all."""

    def advance(self, size: int) -> None:
        """Note that one task of this size is finished."""

    def note(self, text: str) -> None:
        """Say how the work stands, beside the bar."""

    def stop(self) -> None:
        """End the display."""


class Silent:
    """No display."""

    def start(self, what: str, tasks: int, size: int, unit: str = "bytes") -> None:
        """Show nothing."""

    def advance(self, size: int) -> None:
        """Show nothing."""

    def note(self, text: str) -> None:
        """Show nothing."""

    def stop(self) -> None:
        """Show nothing."""


class PartOf:
    """The display of tasks that are part of a longer pass: it goes on, and does not begin again."""

    def __init__(self, whole: Progress) -> None:
        self._whole = whole

    def start(self, what: str, tasks: int, size: int, unit: str = "bytes") -> None:
        """Leave the display as it is."""

    def advance(self, size: int) -> None:
        """Count a task that stands for something in the whole."""
        if size:
            self._whole.advance(size)

    def note(self, text: str) -> None:
        """Say how the work stands."""
        self._whole.note(text)

    def stop(self) -> None:
        """Leave the display as it is."""
