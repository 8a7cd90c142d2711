"""How an output's tensors are distributed over files, decided before any of them exists."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from basiscli.checkpoints.dtypes import DTYPES
from basiscli.checkpoints.header import TensorSpec, encode_header
from basiscli.checkpoints.views import SINGLE_FILE

METADATA = {"format": "pt"}


@dataclass(frozen=True)
class Shard:
    """One file of the output and the tensors in it, in the file's order."""

    file: str
    tensors: tuple[TensorSpec, ...]

    @cached_property
    def header(self) -> tuple[bytes, dict[str, int]]:
        """The header's bytes and each tensor's offset in the file."""
        return encode_header(self.tensors, METADATA)

    @property
    def nbytes(self) -> int:
        """The size of the file."""
        return len(self.header[0]) + sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class Layout:
    """All shards of an output."""

    shards: tuple[Shard, ...]

    @classmethod
    def plan(cls, tensors: Iterable[TensorSpec], shard_bytes: int, single_file: str | None = None) -> Layout:
        """Distribute tensors over shards of at most `shard_bytes` (a larger tensor gets a shard of its own).

        Args:
            tensors: in the order in which they shall be stored.
            shard_bytes: size limit of a shard.
            single_file: put everything in one file of this name, whatever its size (adapters).
        """
        groups: list[list[TensorSpec]] = [[]]
        room = shard_bytes
        for tensor in tensors:
            if groups[-1] and tensor.nbytes > room and single_file is None:
                groups.append([])
                room = shard_bytes
            groups[-1].append(tensor)
            room -= tensor.nbytes
        total = len(groups)
        names = [f"model-{n:05d}-of-{total:05d}.safetensors" for n in range(1, total + 1)]
        if total == 1:
            names = [single_file or SINGLE_FILE]
        # Wider dtypes first within a file: every tensor then begins at a multiple of its element's size.
        return cls(
            tuple(
                Shard(name, tuple(sorted(group, key=lambda t: -_element_bits(t))))
                for name, group in zip(names, groups, strict=True)
            )
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(shard.nbytes for shard in self.shards)

    @cached_property
    def tensors(self) -> dict[str, TensorSpec]:
        """All tensors by name."""
        return {tensor.name: tensor for shard in self.shards for tensor in shard.tensors}

    def index(self) -> dict[str, Any] | None:
        """Return the content of the index file; None for a single file, which has none."""
        if len(self.shards) == 1:
            return None
        where = {tensor.name: shard.file for shard in self.shards for tensor in shard.tensors}
        data_bytes = sum(tensor.nbytes for tensor in self.tensors.values())
        return {"metadata": {"total_size": data_bytes}, "weight_map": dict(sorted(where.items()))}


def _element_bits(tensor: TensorSpec) -> int:
    return DTYPES[tensor.dtype].bits
