"""Choosing the engine that runs a plan's tasks: threads of this process, or a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, get_args

from basiscli.engine.settings import Cluster, EngineName
from basiscli.engine.tasks import Engine
from basiscli.engine.threads import Threads
from basiscli.errors import UsageError

if TYPE_CHECKING:
    import torch

    from basiscli.engine.partial import Plan
    from basiscli.engine.settings import Settings


def cluster_of(options: Mapping[str, Any], plan: Callable[[], Plan]) -> Cluster | None:
    """Return the Ray cluster that a command's options name, None for the local engine.

    Args:
        options: the command's, by name; read are `engine`, `ray_address` and `workers`.
        plan: makes the command's plan again, on another machine; picklable.

    Raises:
        UsageError: an unknown engine, `--engine ray` without Ray installed, or an address without `--engine ray`.
    """
    engine, address, workers = options.get("engine", "local"), options.get("ray_address"), options.get("workers")
    if engine not in get_args(EngineName):
        raise UsageError(f"no engine '{engine}'", remedy=f"one of {', '.join(get_args(EngineName))}")
    if engine == "local":
        if address is not None:
            raise UsageError(f"a Ray address ({address}) for the local engine", remedy="add --engine ray")
        return None
    if find_spec("ray") is None:
        raise UsageError("--engine ray needs Ray, which is not installed", remedy="pip install 'basiscli[ray]'")
    return Cluster(address, workers, plan)


def device_of(settings: Settings) -> torch.device:
    """Return the device that tasks compute on; with a cluster that of its workers, which this machine need not have.

    Raises:
        ResourceError: there is no such device on this machine, and the tasks run on it.
    """
    import torch

    from basiscli.engine.devices import choose_device

    if settings.cluster is None:
        return choose_device(settings.device)
    return torch.device("cpu" if settings.device == "auto" else settings.device)


def refuse_headers_only(headers_only: bool) -> None:
    """Raise if a plan was made from headers alone, without the weights: it can be priced but not run.

    Raises:
        UsageError: `headers_only` is set.
    """
    if headers_only:
        raise UsageError("a plan on headers alone can be priced and not carried out", remedy="leave out headers_only")


@contextmanager
def open_engine(plan: Plan, settings: Settings) -> Iterator[Engine]:
    """Open the engine that runs a plan's tasks, as the settings choose it; a cluster's connection ends on exit.

        with open_engine(plan, settings) as engine:
            engine.run_tasks(tasks, run.do, record, progress=progress, what="merging")

    Raises:
        UsageError: the plan was made from headers alone.
    """
    refuse_headers_only(settings.headers_only)
    if settings.cluster is None:
        from basiscli.engine.streams import devices_of

        yield Threads(settings.workers, devices_of(device_of(settings)), settings.memory, plan.notes)
        return
    from basiscli.engine.ray import connected

    with connected(settings.cluster, plan, device_of(settings)) as engine:
        yield engine
