"""The distribution of an output's tensors over safetensors files, planned before any is written."""

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
    """One file of an output and its tensors in order."""

    file: str
    """Its path in the output folder."""
    tensors: tuple[TensorSpec, ...]

    @cached_property
    def header(self) -> tuple[bytes, dict[str, int]]:
        """The header's bytes, and each tensor's offset in the file in bytes by name."""
        return encode_header(self.tensors, METADATA)

    @property
    def folder(self) -> str:
        """The sub-folder of the output that the file is in: '' or 'name/'."""
        return self.file[: self.file.rfind("/") + 1]

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes."""
        return len(self.header[0]) + sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class Layout:
    """All shards of an output.

        layout = Layout.plan([TensorSpec("w", "BF16", (4096, 4096))], shard_bytes=5_000_000_000)
        layout.locations()["w"]  # ("model.safetensors", 112)

    It depends on names, dtypes, shapes and the size limit alone.
    """

    shards: tuple[Shard, ...]

    @classmethod
    def plan(cls, tensors: Iterable[TensorSpec], shard_bytes: int, single_file: str | None = None) -> Layout:
        """Return tensors distributed over shards of at most `shard_bytes`; a larger tensor gets its own shard.

        Args:
            tensors: in the order of the shards.
            shard_bytes: size limit of a shard.
            single_file: name of one file for all tensors, whatever its size (adapters).
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
        """Return one layout of several outputs in sub-folders; no two of their tensors may have one name."""
        return cls(
            tuple(
                Shard(f"{folder}/{shard.file}", shard.tensors)
                for folder, part in parts.items()
                for shard in part.shards
            )
        )

    @property
    def nbytes(self) -> int:
        """Size of all files in bytes."""
        return sum(shard.nbytes for shard in self.shards)

    @cached_property
    def tensors(self) -> dict[str, TensorSpec]:
        """All tensors by name."""
        return {tensor.name: tensor for shard in self.shards for tensor in shard.tensors}

    def locations(self) -> dict[str, tuple[str, int]]:
        """Return (file, offset in bytes) of each tensor by name."""
        return {t.name: (shard.file, shard.header[1][t.name]) for shard in self.shards for t in shard.tensors}

    def indexes(self) -> dict[str, dict[str, Any]]:
        """Return the contents of the index files by path; a sub-folder of one file has no index."""
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
