"""Tensors that one task leaves for others: in memory, or in files that the machines of a cluster share."""

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
from basiscli.checkpoints.source import Source
from basiscli.checkpoints.views import Checkpoint
from basiscli.checkpoints.writer import Shards, write_file
from basiscli.engine.threads import Engine, Threads

_WINDOWS = "windows"


class Exchange(Protocol):
    """Where tasks put tensors under a key, and get them."""

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors by name; those of an earlier task with the same key are replaced."""

    def get(self, key: str, *names: str) -> dict[str, Tensor]:
        """Return what is kept under a key, on any device: all of it, or the tensors of these names."""

    def drop(self, key: str) -> None:
        """Forget it, if it is there."""


class InMemory:
    """For tasks of one process: the tensors themselves, which nobody may change."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[str, Tensor]] = {}

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors; see `Exchange`."""
        self._kept[key] = dict(tensors)

    def get(self, key: str, *names: str) -> dict[str, Tensor]:
        """Return them; see `Exchange`."""
        kept = self._kept[key]
        return {name: kept[name] for name in names or kept}

    def drop(self, key: str) -> None:
        """Forget them; see `Exchange`."""
        self._kept.pop(key, None)


@dataclass(frozen=True)
class OnDisk:
    """For tasks of several machines: a file a key.

    Files stay until they are dropped, so that the task of a lost worker finds what it reads again; what it wrote is
    replaced as a whole.
    """

    folder: Path

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors; see `Exchange`."""
        specs = [TensorSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()]
        write_file(self._file(key), specs, (tensor.contiguous() for tensor in tensors.values()))

    def get(self, key: str, *names: str) -> dict[str, Tensor]:
        """Return them; see `Exchange`."""
        with closing(Checkpoint.open(Source(key, self._file(key)))) as stored:
            return {name: stored.read(name) for name in names or stored.tensors}

    def drop(self, key: str) -> None:
        """Forget them; see `Exchange`."""
        self._file(key).unlink(missing_ok=True)

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def exchange_of(engine: Engine, output: Shards, windows: Windows) -> Exchange:
    """Return where an engine's tasks find what others left, and the calibration text: no worker reads it again."""
    exchange: Exchange = InMemory() if isinstance(engine, Threads) else OnDisk(output.scratch)
    parts = {"ids": windows.ids, "labels": windows.labels, "mask": windows.attention_mask, "counted": windows.counted}
    exchange.put(_WINDOWS, {name: part for name, part in parts.items() if part is not None})
    return exchange


def get_windows(exchange: Exchange) -> Windows:
    """Return the calibration text."""
    parts = exchange.get(_WINDOWS)
    return Windows(parts["ids"], parts["labels"], parts.get("mask"), "", "", parts.get("counted"))
