"""The local engine: runs tasks in threads of this process, within a memory budget for each device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from basiscli.engine.memory import MemoryBudget
from basiscli.engine.settings import DEFAULT_MEMORY
from basiscli.engine.tasks import Task, largest_first
from basiscli.progress import Progress

if TYPE_CHECKING:
    import torch


def peak_workspace(workspaces: Sequence[int], workers: int, memory: int) -> int:
    """Return the bytes that `Threads` lets tasks take together on a CPU, at most.

    Args:
        workspaces: bytes that each task needs.
        workers: threads.
        memory: the budget in bytes; one task may take more.
    """
    largest = sorted(workspaces, reverse=True)[:workers]
    return min(sum(largest), max([memory, *largest[:1]]))


@dataclass(frozen=True)
class Threads:
    """Runs tasks in threads of this process, as many at a time as the memory of their devices allows.

        engine = Threads(workers=4, devices=[torch.device("cuda:0"), torch.device("cuda:1")])
        tasks = [Task(name, size=nbytes, workspace=3 * nbytes, arguments=(name,)) for name, nbytes in sizes.items()]
        engine.run_tasks(tasks, run.merge_tensor, journal.record, progress=Silent(), what="merging")


    Every thread is a pipeline of its own: it reads, copies, computes, copies back and writes. On a GPU each has a
    stream, so that one thread's copies run beside another's kernels while others read, hash and write; several GPUs
    share the threads and the list of tasks.

    Every task runs single-threaded: BLAS sums in another order with another number of threads, so results could not be
    the same bytes for any number of workers. The parallelism is between tasks.
    """

    workers: int
    devices: Sequence[torch.device] = ()
    """Thread n computes on device n modulo their number; without any, tasks choose their own."""
    memory: int = DEFAULT_MEMORY
    """Bytes that tasks may take together on a CPU; on a GPU 80 % of what is free. One task alone may take more."""
    notes: list[str] = field(default_factory=list)
    """The plan's notes for the report; tasks that ran out of memory and were run again are added."""

    def run_tasks(
        self,
        tasks: Sequence[Task],
        do: Callable[..., dict[str, Any]],
        record: Callable[[str, dict[str, Any]], None],
        *,
        progress: Progress,
        what: str,
    ) -> None:
        """Run tasks and record each as it ends; see `Engine.run_tasks` for the arguments.

        A task that runs out of memory runs again when it is alone on its device, a batch one member after another, and
        a task that does not fit a GPU alone runs on the CPU.
        """
        from basiscli.engine.batches import do_task
        from basiscli.engine.streams import budget_bytes, exact_arithmetic, on_device

        queue: Iterator[Task] = iter(largest_first(tasks))
        lock = threading.Lock()
        largest = max((task.workspace for task in tasks), default=0)
        devices: Sequence[torch.device | None] = self.devices or (None,)
        budgets = [MemoryBudget(max(budget_bytes(device, self.memory), largest)) for device in devices]
        failure: BaseException | None = None

        def take() -> Task | None:
            with lock:
                return next(queue, None) if failure is None else None

        def work(device: torch.device | None, budget: MemoryBudget) -> None:
            nonlocal failure
            try:
                with on_device(device):
                    while (task := take()) is not None:
                        with budget.acquire(task.workspace, lambda: failure is not None) as held:
                            if not held:
                                return
                            entries = _unless_out_of_memory(partial(do_task, do, task))
                        if entries is None:
                            parts = task.members or (task,)
                            beside = f", with {len(parts) - 1} others in a batch," if task.members else ""
                            self._say(f"{task.key}{beside} ran out of memory and was done again, alone", progress)
                            with budget.exclusive():
                                entries = {part.key: self._alone(do, part, progress) for part in parts}
                        for key, entry in entries.items():
                            record(key, entry)
                        progress.advance(task.size)
            except BaseException as error:  # handed to the caller's thread
                failure = failure or error
                for other in budgets:
                    other.wake()

        progress.start(what, len(tasks), sum(task.size for task in tasks))
        with exact_arithmetic():
            threads = [
                threading.Thread(
                    target=work,
                    args=(devices[n % len(devices)], budgets[n % len(budgets)]),
                    name=f"basis-{n}",
                    daemon=True,
                )
                for n in range(self.workers)
            ]
            try:
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            except KeyboardInterrupt as interrupt:
                failure = interrupt
                for budget in budgets:
                    budget.wake()
                for thread in threads:
                    thread.join()
                raise
        if failure is not None:
            raise failure

    def _alone(self, do: Callable[..., dict[str, Any]], task: Task, progress: Progress) -> dict[str, Any]:
        """Do a task that ran out of memory beside others."""
        from basiscli.engine.streams import free_cached, on_cpu

        free_cached()
        elsewhere = on_cpu(do)
        if elsewhere is None:
            return do(*task.arguments)
        entry = _unless_out_of_memory(partial(do, *task.arguments))
        if entry is None:
            free_cached()
            self._say(f"{task.key} does not fit the device's memory and was done on the CPU", progress)
            entry = elsewhere(*task.arguments)
        return entry

    def _say(self, text: str, progress: Progress) -> None:
        progress.note(text)
        self.notes.append(text)


def _unless_out_of_memory(do: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """Return what this does; None where its device's memory did not suffice.

    The error ends here, and with it all that its frames hold.
    """
    from basiscli.engine.devices import ran_out_of_memory

    try:
        return do()
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        return None
