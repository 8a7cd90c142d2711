"""The memory of one device, shared by the tasks that run on it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class MemoryBudget:
    """So many bytes, handed out to tasks; a task that needs more than there are runs alone."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = size
        self._running = 0
        self._reserved = False
        """Whether a task is running alone, or waiting to."""
        self._changed = threading.Condition()

    @contextmanager
    def share(self, needed: int, given_up: Callable[[], bool]) -> Iterator[bool]:
        """Wait for so much memory and hold it; False, with nothing held, if the whole run is given up meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: given_up() or (not self._reserved and self._fits(needed)))
            held = not given_up()
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
    def alone(self) -> Iterator[None]:
        """Wait until no task holds memory, and let none begin meanwhile."""
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
        """Have those who wait look again whether the run is given up."""
        with self._changed:
            self._changed.notify_all()

    def _fits(self, needed: int) -> bool:
        return self._running == 0 or needed <= self._free
