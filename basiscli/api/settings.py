"""From options by name to the settings of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from basiscli.checkpoints.dtypes import parse_dtype
from basiscli.engine.cluster import Cluster
from basiscli.engine.local import default_workers
from basiscli.engine.merge_plan import Settings
from basiscli.errors import UsageError
from basiscli.names import parse_size


def run_settings(options: Mapping[str, Any], names: Sequence[str], cluster: Cluster | None = None) -> Settings:
    """Return the settings that `merge`, `init` and `extract` share.

    Args:
        options: what was given by name; absent ones have their defaults.
        names: those that are taken as they are.
        cluster: what does the tasks, if not this machine.

    Raises:
        UsageError: no worker, an unknown dtype, a size that is none.
    """
    workers, dtype = options.get("workers"), options.get("dtype")
    if workers is not None and workers < 1:
        raise UsageError(f"{workers} workers", remedy="at least one")
    return Settings(
        dtype=parse_dtype(dtype) if dtype else None,
        shard_bytes=parse_size(options.get("shard_size", "5GB")),
        workers=workers or default_workers(),
        cluster=cluster,
        **{name: options[name] for name in names if name in options},
    )
