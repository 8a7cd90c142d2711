"""Tasks, and what does them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from basiscli.progress import Progress

if TYPE_CHECKING:
    pass


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
    members: tuple[Task, ...] = ()
    """The tasks that this one, then a batch without arguments of its own, does in step."""


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
