"""Tasks and what does them; here in threads of one machine, within a memory budget."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

MIN_BUDGET_BYTES = 1 << 30  # below this, tasks run side by side without being counted


@dataclass(frozen=True)
class Task:
    """One piece of work: usually one output tensor."""

    key: str
    """Its name in the journal."""
    size: int
    """Bytes it stands for in the progress bar."""
    workspace: int
    """Bytes of memory it needs while it runs."""
    arguments: tuple[Any, ...]
    """What the function that does it takes; plain data where another machine may do it."""


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


def default_workers() -> int:
    """Return the number of processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_workspace(workspaces: Sequence[int], workers: int) -> int:
    """Return the most memory that `Threads` lets tasks take together."""
    largest = sorted(workspaces, reverse=True)[:workers]
    return min(sum(largest), max([MIN_BUDGET_BYTES, *largest[:1]]))


def largest_first(tasks: Iterable[Task]) -> list[Task]:
    """Return tasks in the order in which they are begun."""
    return sorted(tasks, key=lambda task: (-task.workspace, task.key))


class Engine(Protocol):
    """What does tasks, here or elsewhere."""

    def run_tasks(
        self,
        tasks: Sequence[Task],
        do: Callable[..., dict[str, Any]],
        record: Callable[[str, dict[str, Any]], None],
        *,
        progress: Progress,
        what: str,
    ) -> None:
        """Run tasks, the largest first, and record each as it ends; the first error stops the rest and is raised.

        Args:
            tasks: in any order; none depends on another.
            do: takes a task's arguments, does it and returns the journal's entry; a run's method, so that a cluster's
                workers can call it on a run of their own.
            record: takes a task's key and entry, in this process.
            progress: what to tell how far the work is.
            what: what the display calls it.
        """


@dataclass(frozen=True)
class Threads:
    """Does tasks in threads of this process, as many at a time as the memory budget allows.

    Every task runs single-threaded: BLAS sums in another order with another number of threads, so results could not be
    the same bytes for any number of workers. The parallelism is between tasks.
    """

    workers: int

    def run_tasks(
        self,
        tasks: Sequence[Task],
        do: Callable[..., dict[str, Any]],
        record: Callable[[str, dict[str, Any]], None],
        *,
        progress: Progress,
        what: str,
    ) -> None:
        """Run tasks; see `Engine`."""
        queue: Iterator[Task] = iter(largest_first(tasks))
        budget = max([MIN_BUDGET_BYTES, *(task.workspace for task in tasks)])
        condition = threading.Condition()
        in_use = 0
        failure: BaseException | None = None

        def take() -> Task | None:
            nonlocal in_use
            with condition:
                task = next(queue, None) if failure is None else None
                if task is not None:
                    condition.wait_for(lambda: in_use + task.workspace <= budget or failure is not None)
                    in_use += task.workspace
                return task

        def work() -> None:
            nonlocal in_use, failure
            while (task := take()) is not None and failure is None:
                try:
                    record(task.key, do(*task.arguments))
                    progress.advance(task.size)
                except BaseException as error:  # handed to the caller's thread
                    failure = failure or error
                finally:
                    with condition:
                        in_use -= task.workspace
                        condition.notify_all()

        progress.start(what, len(tasks), sum(task.size for task in tasks))
        with _one_thread_each():
            threads = [threading.Thread(target=work, name=f"basis-{n}", daemon=True) for n in range(self.workers)]
            try:
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            except KeyboardInterrupt as interrupt:
                failure = interrupt
                for thread in threads:
                    thread.join()
                raise
        if failure is not None:
            raise failure


@contextmanager
def _one_thread_each() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
