"""Stores of tensors by key, through which tasks hand results on: in memory, or in files on a shared disk."""

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
    """A store of named tensors under keys, which tasks of one run share."""

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors by name; those of an earlier task with the same key are replaced."""

    def get(self, key: str, *names: str) -> dict[str, Tensor]:
        """Return what is kept under a key, on any device: all of it, or the tensors of these names."""

    def drop(self, key: str) -> None:
        """Forget it, if it is there."""


class MemoryStore:
    """For tasks of one process: the tensors themselves, which nobody may change."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[str, Tensor]] = {}

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors; see `TensorStore`."""
        self._kept[key] = dict(tensors)

    def get(self, key: str, *names: str) -> dict[str, Tensor]:
        """Return them; see `TensorStore`."""
        kept = self._kept[key]
        return {name: kept[name] for name in names or kept}

    def drop(self, key: str) -> None:
        """Forget them; see `TensorStore`."""
        self._kept.pop(key, None)


@dataclass(frozen=True)
class FileStore:
    """For tasks of several machines: a file a key.

    Files stay until they are dropped, so that the task of a lost worker finds what it reads again; what it wrote is
    replaced as a whole.
    """

    folder: Path

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors; see `TensorStore`."""
        specs = [TensorSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()]
        write_file(self._file(key), specs, (tensor.contiguous() for tensor in tensors.values()))

    def get(self, key: str, *names: str) -> dict[str, Tensor]:
        """Return them; see `TensorStore`."""
        with closing(Checkpoint.open(Source(key, self._file(key)))) as stored:
            return {name: stored.read(name) for name in names or stored.tensors}

    def drop(self, key: str) -> None:
        """Forget them; see `TensorStore`."""
        self._file(key).unlink(missing_ok=True)

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def store_for(engine: Engine, output: Shards, windows: Windows) -> TensorStore:
    """Return the store that an engine needs, with the calibration text in it so that no worker tokenises it again."""
    store: TensorStore = MemoryStore() if isinstance(engine, Threads) else FileStore(output.scratch)
    parts = {"ids": windows.ids, "labels": windows.labels, "mask": windows.attention_mask, "counted": windows.counted}
    store.put(_WINDOWS, {name: part for name, part in parts.items() if part is not None})
    return store


def get_windows(store: TensorStore) -> Windows:
    """Return the calibration text."""
    parts = store.get(_WINDOWS)
    return Windows(parts["ids"], parts["labels"], parts.get("mask"), "", "", parts.get("counted"))
