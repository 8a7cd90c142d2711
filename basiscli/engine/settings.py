"""What the commands that write models take by name, and the settings of a run that are made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from basiscli.checkpoints.dtypes import parse_dtype
from basiscli.commands.merge.plan import Settings
from basiscli.engine.cluster import Cluster, EngineOptions
from basiscli.engine.threads import DEFAULT_MEMORY, default_workers
from basiscli.errors import UsageError
from basiscli.names import parse_size


class OutputOptions(EngineOptions, total=False):
    """Where a model is written, and by what means; `merge` documents each."""

    output: str | Path | None
    device: str
    dtype: str | None
    shard_size: str
    workers: int | None
    seed: int
    resume: bool
    overwrite: bool


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
