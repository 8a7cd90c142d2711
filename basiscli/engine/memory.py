"""The memory of one device, shared by the tasks that run on it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class MemoryBudget:
    """Bytes of one device's memory, which tasks acquire while they run.

        budget = MemoryBudget(8_000_000_000)
        with budget.acquire(task.workspace, lambda: failed) as acquired:
            if acquired:
                …

    A task that needs more than the whole budget runs when no other does.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = size
        self._running = 0
        self._reserved = False
        """Whether a task runs exclusively, or waits to."""
        self._changed = threading.Condition()

    @contextmanager
    def acquire(self, needed: int, cancelled: Callable[[], bool]) -> Iterator[bool]:
        """Wait until so many bytes are free and hold them; yield False, with none held, if the run is cancelled first.

        Args:
            needed: bytes; more than the whole budget has are given when no other task runs.
            cancelled: whether the run has failed or was interrupted; asked again at every `wake`.
        """
        with self._changed:
            self._changed.wait_for(lambda: cancelled() or (not self._reserved and self._fits(needed)))
            held = not cancelled()
            if held:
                self._free -= needed
                self._running += 1
        try:
            yield held
        finally:
            if held:
                with self._changed:
                    self._free += needed
                    self._running -= 1
                    self._changed.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the whole device: wait until no task holds memory, and let none acquire any until the block ends."""
        with self._changed:
            self._changed.wait_for(lambda: not self._reserved)
            self._reserved = True
            self._changed.wait_for(lambda: self._running == 0)
        try:
            yield
        finally:
            with self._changed:
                self._reserved = False
                self._changed.notify_all()

    def wake(self) -> None:
        """Make all waiting tasks check again whether the run is cancelled."""
        with self._changed:
            self._changed.notify_all()

    def _fits(self, needed: int) -> bool:
        return self._running == 0 or needed <= self._free
