"""Tasks, and the interface of the engines that run them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from basiscli.progress import Progress


@dataclass(frozen=True)
class Task:
    """One piece of work: usually one output tensor."""

    key: str
    """Its name in the journal."""
    size: int
    """Bytes by which it advances the progress bar."""
    workspace: int
    """Bytes of memory it needs while it runs."""
    arguments: tuple[Any, ...]
    """Arguments of the function that runs it; picklable where a cluster may."""
    members: tuple[Task, ...] = ()
    """For a batch: the tasks that it runs in lockstep; it has no arguments of its own."""


def largest_first(tasks: Iterable[Task]) -> list[Task]:
    """Return tasks in the order in which engines start them: by falling workspace, then by key."""
    return sorted(tasks, key=lambda task: (-task.workspace, task.key))


class Engine(Protocol):
    """Runs tasks: `Threads` in this process, `RayEngine` on a cluster."""

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

            engine.run_tasks(tasks, run.merge_tensor, output.record, progress=progress, what="merging")

        Args:
            tasks: in any order; none depends on another.
            do: takes a task's arguments, does the work and returns the journal's entry (JSON); a run's method, so that
                a cluster's workers can call it on a run of their own.
            record: takes a task's key and entry, in this process.
            progress: the display; advances by each task's `size`.
            what: the display's title for the work, such as `merging`.
        """
