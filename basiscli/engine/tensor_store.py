"""Tensor stores, through which tasks pass tensors to later tasks: in memory, or in files on a shared disk."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from basiscli.calibration.tokens import Windows
from basiscli.checkpoints.dtypes import dtype_name
from basiscli.checkpoints.header import TensorSpec
from basiscli.checkpoints.scratch import write_file
from basiscli.checkpoints.shards import Shards
from basiscli.checkpoints.source import Source
from basiscli.checkpoints.views import Checkpoint
from basiscli.engine.tasks import Engine
from basiscli.engine.threads import Threads

_WINDOWS = "windows"


class TensorStore(Protocol):
    """Named tensors by key, shared by the tasks of one run.

        store.put("hidden-0-3", {"hidden": hidden})
        hidden = store.get("hidden-0-3")["hidden"]
        store.drop("hidden-0-3")

    `store_for` makes the one that an engine needs.
    """

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store tensors by name under a key, replacing all that the key had. Nobody may change them afterwards."""

    def get(self, key: str, *names: str) -> dict[str, Tensor]:
        """Return the tensors under a key, of these names or all, in the order of the names; on any device.

        Raises:
            LookupError: there is no such key or name; `FileStore` raises an InputError.
        """

    def drop(self, key: str) -> None:
        """Remove a key and its tensors; nothing if it is absent."""


class MemoryStore:
    """A `TensorStore` for tasks of one process: a dict of the tensors themselves, without copies."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[str, Tensor]] = {}

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store tensors; see `TensorStore`."""
        self._kept[key] = dict(tensors)

    def get(self, key: str, *names: str) -> dict[str, Tensor]:
        """Return tensors; see `TensorStore`."""
        kept = self._kept[key]
        return {name: kept[name] for name in names or kept}

    def drop(self, key: str) -> None:
        """Remove a key; see `TensorStore`."""
        self._kept.pop(key, None)


@dataclass(frozen=True)
class FileStore:
    """A `TensorStore` for tasks on several machines: one safetensors file a key, in a shared folder.

    Files stay until they are dropped, so that the task of a lost worker finds what it reads again; what it wrote is
    replaced as a whole.
    """

    folder: Path

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Write the key's file; see `TensorStore`."""
        specs = [TensorSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()]
        write_file(self._file(key), specs, (tensor.contiguous() for tensor in tensors.values()))

    def get(self, key: str, *names: str) -> dict[str, Tensor]:
        """Read tensors onto the CPU; see `TensorStore`."""
        with closing(Checkpoint.open(Source(key, self._file(key)))) as stored:
            return {name: stored.read(name) for name in names or stored.tensors}

    def drop(self, key: str) -> None:
        """Delete the key's file; see `TensorStore`."""
        self._file(key).unlink(missing_ok=True)

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def store_for(engine: Engine, output: Shards, windows: Windows) -> TensorStore:
    """Return a tensor store that all of an engine's workers reach, with the calibration windows already in it."""
    store: TensorStore = MemoryStore() if isinstance(engine, Threads) else FileStore(output.scratch)
    parts = {"ids": windows.ids, "labels": windows.labels, "mask": windows.attention_mask, "counted": windows.counted}
    store.put(_WINDOWS, {name: part for name, part in parts.items() if part is not None})
    return store


def get_windows(store: TensorStore) -> Windows:
    """Return the calibration windows that `store_for` stored, so that no worker tokenises the text again."""
    parts = store.get(_WINDOWS)
    return Windows(parts["ids"], parts["labels"], parts.get("mask"), "", "", parts.get("counted"))
