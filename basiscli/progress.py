"""Progress displays."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Shows the progress of a run, one pass after another.

        progress.start("merging", tasks=200, size=5_000_000_000)
        progress.advance(25_000_000)  # from any thread
        progress.stop()

    Python functions take one as `progress`; `Silent` is the default.
    """

    def start(self, what: str, tasks: int, size: int, unit: str = "bytes") -> None:
        """Begin a pass of `tasks` tasks with `size` bytes (or another unit) in all; `what` is its title."""

    def advance(self, size: int) -> None:
        """Count one finished task of this size."""

    def note(self, text: str) -> None:
        """Show a text, such as the loss, beside the bar."""

    def stop(self) -> None:
        """End the display."""


class Silent:
    """A progress display that shows nothing."""

    def start(self, what: str, tasks: int, size: int, unit: str = "bytes") -> None:
        """Show nothing."""

    def advance(self, size: int) -> None:
        """Show nothing."""

    def note(self, text: str) -> None:
        """Show nothing."""

    def stop(self) -> None:
        """Show nothing."""


class PartOf:
    """A progress display for tasks within a longer pass, whose bar goes on: `start` and `stop` do nothing."""

    def __init__(self, whole: Progress) -> None:
        self._whole = whole

    def start(self, what: str, tasks: int, size: int, unit: str = "bytes") -> None:
        """Leave the display as it is."""

    def advance(self, size: int) -> None:
        """Count a finished task, if it has a size in the whole."""
        if size:
            self._whole.advance(size)

    def note(self, text: str) -> None:
        """Show a text beside the bar of the whole."""
        self._whole.note(text)

    def stop(self) -> None:
        """Leave the display as it is."""
