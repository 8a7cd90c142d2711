"""Moments of the inputs of an adapter's targets: the calibration text runs through the model, a layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from basiscli.calibration.tokens import Windows, read_windows
from basiscli.commands.init.plan import InitPlan
from basiscli.commands.init.run import InitRun
from basiscli.engine.tasks import Engine, Task
from basiscli.engine.threads import Threads
from basiscli.model.moments import MomentsRun
from basiscli.model.stored_moments import StoredMoments
from basiscli.progress import PartOf
from basiscli.runtime.load import load_tokenizer


def calibration_windows(plan: InitPlan) -> Windows:
    """Return the plan's calibration text as windows [n, length] of token ids, spread over the text.

    Raises:
        InputError: no text, fewer tokens than one window, or tokens of another vocabulary.
    """
    given, model = plan.calibration, plan.model
    assert given is not None
    vocabulary = model.vocabulary_size or 1 << 62
    windows = read_windows(given.place, lambda: load_tokenizer(model.source.folder), given.length, vocabulary)
    return windows.spread(max(1, given.tokens // windows.ids.shape[1]))


def moments_by_layer(run: InitRun) -> Iterator[dict[str, StoredMoments]]:
    """Run the calibration text of a run through its model; yield moments by module, as `MomentsRun.moments` does."""
    assert run.windows is not None
    engine = _in_order(run)
    return MomentsRun(run.plan, run.output, run.progress, run.device, engine).moments(run.windows)


def do_locally(
    run: InitRun,
    tasks: Sequence[Task],
    work: Callable[..., dict[str, Any]],
    record: Callable[[str, dict[str, Any]], None],
) -> None:
    """Do tasks that take moments of `moments_by_layer`, as part of its progress."""
    _in_order(run).run_tasks(tasks, work, record, progress=PartOf(run.progress), what="")


def _in_order(run: InitRun) -> Engine:
    """Return the engine for tasks that hand tensors on: on a GPU one thread, as streams do not wait for each other."""
    if isinstance(run.engine, Threads) and run.device.type == "cuda":
        return Threads(1, notes=run.engine.notes)
    return run.engine
