"""How a run is done: its settings, as plain data, made of what a command was told."""

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
"""Bytes that tasks may take together on a CPU, where the user does not say otherwise."""


def default_workers() -> int:
    """Return the number of processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster, and how its workers make the plan of the run they take part in."""

    address: str | None
    """As Ray takes it ('auto', 'host:port'); None starts one on this machine."""
    workers: int | None
    """Tasks at a time; None for as many as the cluster has processors."""
    plan: Callable[[], Plan]
    """Plain data and a function that other machines have, too, so that it can be pickled."""


@dataclass(frozen=True)
class Settings:
    """How a run is done; only `dtype`, `seed` and the three permissions change the result."""

    device: str = "auto"
    dtype: str | None = None
    shard_bytes: int = 5_000_000_000
    workers: int = field(default_factory=default_workers)
    memory: int = DEFAULT_MEMORY
    """Bytes that tensors worked on side by side may take on a CPU."""
    seed: int = 0
    resume: bool = True
    overwrite: bool = False
    allow_nonfinite: bool = False
    allow_missing: bool = False
    trust_remote_code: bool = False
    headers_only: bool = False
    """Whether inputs may lack their data: such a plan tells what the work would cost, and cannot be carried out."""
    cluster: Cluster | None = None
    """Where the tasks are done, if not in threads of this machine."""

    @property
    def shared_memory(self) -> int | None:
        """Bytes that all tasks take together, at most; None on a cluster, whose machines have each their own."""
        return None if self.cluster is not None else self.memory


def run_settings(options: Mapping[str, Any], cluster: Cluster | None = None) -> Settings:
    """Return the settings that `merge`, `init` and `extract` share.

    Args:
        options: what was given by name; absent ones have their defaults.
        cluster: what does the tasks, if not this machine.

    Raises:
        UsageError: no worker, an unknown dtype, a size that is none.
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
