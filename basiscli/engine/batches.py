"""Tasks of one kind that are done in step, so that a GPU decomposes their matrices together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Hashable, Iterable, Sequence
from typing import Any

import torch

from basiscli.engine.streams import same_stream
from basiscli.engine.tasks import Task
from basiscli.linalg.eigen import GivenUp, Step

MOST_MEMBERS = 16
MOST_BYTES = 4_000_000_000
"""Of a batch's workspace. Not what a GPU has free: the bytes of results would depend on it."""
_BATCHING = frozenset({"cuda"})  # a CPU takes one matrix of a batch after another, and its threads side by side


def in_batches(
    tasks: Iterable[Task],
    alike: Callable[[Task], Hashable | None],
    *,
    device: torch.device,
    done: Container[str],
) -> list[Task]:
    """Return what is not done of a run's tasks, those that are alike as batches where the device is for it.

    How a matrix is decomposed on a GPU, and so the last bits of the result, depends on what is decomposed beside it.
    The batches are therefore made of all tasks, whatever is done; one of which something is left is done as a whole.

    Args:
        tasks: all of a pass.
        alike: returns what tasks of one batch have in common; None for a task that needs none.
        device: where they are done.
        done: the keys of finished tasks.
    """
    batching = device.type in _BATCHING
    open_batches: dict[Hashable, list[Task]] = {}
    batches: list[list[Task]] = []
    for task in tasks:
        kind = alike(task) if batching else None
        batch = open_batches.get(kind) if kind is not None else None
        if batch is None or len(batch) == MOST_MEMBERS or _workspace([*batch, task]) > MOST_BYTES:
            batch = []
            batches.append(batch)
            if kind is not None:
                open_batches[kind] = batch
        batch.append(task)
    return [_as_one(batch) for batch in batches if any(task.key not in done for task in batch)]


def do_task(do: Callable[..., dict[str, Any]], task: Task) -> dict[str, dict[str, Any]]:
    """Do a task, or the members of a batch in step; return the journal's entries by key."""
    if not task.members:
        return {task.key: do(*task.arguments)}
    step, stream = Step(len(task.members)), same_stream()
    entries: dict[str, dict[str, Any]] = {}
    errors: list[BaseException] = []

    def work(number: int, member: Task) -> None:
        try:
            with stream(), step.member(number):
                entries[member.key] = do(*member.arguments)
        except GivenUp:
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
        step.give_up()
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
