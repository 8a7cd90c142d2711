"""How an output's tensors are distributed over files, decided before any of them exists."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from basiscli.checkpoints.dtypes import DTYPES
from basiscli.checkpoints.files import INDEX_FILE, SINGLE_FILE
from basiscli.checkpoints.header import TensorSpec, encode_header

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
    def folder(self) -> str:
        """The folder inside the output that holds the file: '' or 'name/'."""
        return self.file[: self.file.rfind("/") + 1]

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

    @classmethod
    def of_folders(cls, parts: Mapping[str, Layout]) -> Layout:
        """Return one layout of several outputs, each in a folder of its own; their tensors have different names."""
        return cls(
            tuple(
                Shard(f"{folder}/{shard.file}", shard.tensors)
                for folder, part in parts.items()
                for shard in part.shards
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

    def locations(self) -> dict[str, tuple[str, int]]:
        """Return each tensor's file and its offset there in bytes, by the tensor's name."""
        return {t.name: (shard.file, shard.header[1][t.name]) for shard in self.shards for t in shard.tensors}

    def indexes(self) -> dict[str, dict[str, Any]]:
        """Return the content of each folder's index file, by its path; a folder of one file has none."""
        found = {}
        for folder in dict.fromkeys(shard.folder for shard in self.shards):
            inside = [shard for shard in self.shards if shard.folder == folder]
            if len(inside) > 1:
                where = {tensor.name: shard.file.removeprefix(folder) for shard in inside for tensor in shard.tensors}
                data_bytes = sum(tensor.nbytes for shard in inside for tensor in shard.tensors)
                found[folder + INDEX_FILE] = {
                    "metadata": {"total_size": data_bytes},
                    "weight_map": dict(sorted(where.items())),
                }
        return found


def _element_bits(tensor: TensorSpec) -> int:
    return DTYPES[tensor.dtype].bits
