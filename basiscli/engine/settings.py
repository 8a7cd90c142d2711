"""Settings of a run (device, dtype, workers, memory, seed, cluster) as plain data, made of a command's options."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from basiscli.checkpoints.dtypes import parse_dtype
from basiscli.errors import UsageError
from basiscli.names import parse_size

if TYPE_CHECKING:
    from basiscli.engine.partial import Plan

EngineName = Literal["local", "ray"]
DEFAULT_MEMORY = 1_000_000_000
"""Default of `Settings.memory`, in bytes."""


def default_workers() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster: its address, and the function by which its workers make the run's plan."""

    address: str | None
    """As Ray takes it ('auto', 'host:port'); None starts one on this machine."""
    workers: int | None
    """Tasks at a time; None for as many as the cluster has processors."""
    plan: Callable[[], Plan]
    """Makes the command's plan again; picklable: a module's function with plain arguments."""


@dataclass(frozen=True)
class Settings:
    """Settings of a run; of these only `dtype`, `seed` and the three permissions change the result."""

    device: str = "auto"
    dtype: str | None = None
    shard_bytes: int = 5_000_000_000
    workers: int = field(default_factory=default_workers)
    memory: int = DEFAULT_MEMORY
    """Memory budget in bytes of all tasks that run at the same time on a CPU."""
    seed: int = 0
    resume: bool = True
    overwrite: bool = False
    allow_nonfinite: bool = False
    allow_missing: bool = False
    trust_remote_code: bool = False
    headers_only: bool = False
    """Whether to plan from headers, without the inputs' data: such a plan has a price and cannot be run."""
    cluster: Cluster | None = None
    """The Ray cluster that runs the tasks; None for threads of this process."""

    @property
    def shared_memory(self) -> int | None:
        """Memory budget in bytes of all tasks together; None on a cluster, where each machine has its own."""
        return None if self.cluster is not None else self.memory


def run_settings(options: Mapping[str, Any], cluster: Cluster | None = None) -> Settings:
    """Return the settings of a run of `merge`, `init` or `extract`.

    Args:
        options: the command's, by name; absent ones have their defaults.
        cluster: what runs the tasks, if not this process.

    Raises:
        UsageError: fewer than one worker, an unknown dtype, or a size that cannot be parsed.
    """
    workers, dtype = options.get("workers"), options.get("dtype")
    if workers is not None and workers < 1:
        raise UsageError(f"{workers} workers", remedy="at least one")
    read: dict[str, Any] = {
        "dtype": parse_dtype(dtype) if dtype else None,
        "shard_bytes": parse_size(options.get("shard_size", "5GB")),
        "workers": workers or default_workers(),
        "memory": parse_size(options["memory"]) if "memory" in options else DEFAULT_MEMORY,
        "cluster": cluster,
    }
    as_given = {field.name for field in fields(Settings)} & options.keys() - read.keys()
    return Settings(**read, **{name: options[name] for name in as_given})
