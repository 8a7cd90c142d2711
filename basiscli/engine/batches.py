"""Batches of tasks with equal shapes, run in lockstep so that a GPU decomposes their matrices in one call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Hashable, Iterable, Sequence
from typing import Any

import torch

from basiscli.engine.streams import same_stream
from basiscli.engine.tasks import Task
from basiscli.linalg.eigen import Aborted, Lockstep

MAX_TASKS = 16
"""Tasks in one batch, at most."""
MAX_WORKSPACE = 4_000_000_000
"""Bytes of workspace of one batch, at most. A constant, since results would depend on what a GPU has free."""
_BATCHING = frozenset({"cuda"})  # a CPU takes one matrix of a batch after another, and its threads side by side


def in_batches(
    tasks: Iterable[Task],
    batch_key: Callable[[Task], Hashable | None],
    *,
    device: torch.device,
    done: Container[str],
) -> list[Task]:
    """Return the unfinished tasks of a run, on a GPU with those of equal `batch_key` combined into batches.

    A batch is a `Task` whose `members` are the tasks in it. How a matrix is decomposed on a GPU, and so the last bits
    of the result, depends on what is decomposed beside it. The batches are therefore made of all tasks, finished ones
    too, and a batch with one unfinished task is run as a whole.

        tasks = in_batches(all_tasks, lambda task: task.arguments[0].shape, device=device, done=journal)

    Args:
        tasks: all tasks of the run, finished ones too.
        batch_key: returns what the tasks of one batch have in common, such as a shape; None for a task of its own.
        device: what the tasks run on.
        done: the keys of finished tasks.
    """
    batching = device.type in _BATCHING
    open_batches: dict[Hashable, list[Task]] = {}
    batches: list[list[Task]] = []
    for task in tasks:
        kind = batch_key(task) if batching else None
        batch = open_batches.get(kind) if kind is not None else None
        if batch is None or len(batch) == MAX_TASKS or _workspace([*batch, task]) > MAX_WORKSPACE:
            batch = []
            batches.append(batch)
            if kind is not None:
                open_batches[kind] = batch
        batch.append(task)
    return [_as_one(batch) for batch in batches if any(task.key not in done for task in batch)]


def do_task(do: Callable[..., dict[str, Any]], task: Task) -> dict[str, dict[str, Any]]:
    """Run a task, or the members of a batch in lockstep, one thread each; return the journal's entries by task key.

    Args:
        do: takes a task's arguments and returns its journal entry.
        task: a single task or a batch made by `in_batches`.
    """
    if not task.members:
        return {task.key: do(*task.arguments)}
    lockstep, stream = Lockstep(len(task.members)), same_stream()
    entries: dict[str, dict[str, Any]] = {}
    errors: list[BaseException] = []

    def work(number: int, member: Task) -> None:
        try:
            with stream(), lockstep.member(number):
                entries[member.key] = do(*member.arguments)
        except Aborted:
            pass  # the thread that failed says why
        except BaseException as error:  # handed to the caller's thread
            errors.append(error)

    threads = [
        threading.Thread(target=work, args=(n, member), name=f"{threading.current_thread().name}.{n}", daemon=True)
        for n, member in enumerate(task.members)
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:  # a signal, where this is the main thread: nothing may be writing when it is passed on
        lockstep.abort()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        raise
    if errors:
        try:
            raise errors[0]
        finally:  # a list in a frame of its own traceback would keep all that the frames hold
            errors.clear()
    return {member.key: entries[member.key] for member in task.members}


def _as_one(batch: Sequence[Task]) -> Task:
    if len(batch) == 1:
        return batch[0]
    return Task(batch[0].key, sum(task.size for task in batch), _workspace(batch), (), tuple(batch))


def _workspace(tasks: Iterable[Task]) -> int:
    return sum(task.workspace for task in tasks)
