"""The files of an output while their tensors are being written, each at its offset, in any order."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from basiscli.checkpoints.direct import DirectFile
from basiscli.checkpoints.disk import disk_error, write_all
from basiscli.checkpoints.dtypes import raw_bytes
from basiscli.checkpoints.layout import Layout
from basiscli.checkpoints.transfer import to_host

if TYPE_CHECKING:
    import torch

JOURNAL = "journal.jsonl"
SCRATCH = "scratch"


def partial_folder(out: Path) -> Path:
    """Return the folder that an output is written in: `OUT.partial`."""
    return out.with_name(f"{out.name}.partial")


def replaced_folder(out: Path) -> Path:
    """Return the folder that an earlier output is moved to while the new one takes its name: `OUT.replaced`."""
    return out.with_name(f"{out.name}.replaced")


class Shards:
    """The safetensors files of a layout, open for writing in `OUT.partial/`, and the scratch folder beside them."""

    def __init__(self, out: Path, layout: Layout) -> None:
        self.out, self.layout = out, layout
        self.folder = partial_folder(out)
        self.scratch = self.folder / SCRATCH
        self._locations = layout.locations()
        self._descriptors: dict[str, int] = {}
        self._direct: dict[str, DirectFile] = {}

    @classmethod
    def join(cls, out: Path, layout: Layout, fingerprint: str) -> Shards:
        """Return the open files of a run on another machine, whose journal stays its own.

        They are opened for writing alone. A network file system's client that may also read keeps whole pages, and
        would write the bytes of other machines' tensors on them back as it found them.

        Raises:
            OSError: they are not there, or of another run.
        """
        shards = cls(out, layout)
        with (shards.folder / JOURNAL).open("rb") as journal:
            if json.loads(journal.readline()) != {"fingerprint": fingerprint}:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(shards.folder))
        for shard in layout.shards:
            shards._descriptors[shard.file] = os.open(shards.folder / shard.file, os.O_WRONLY)
        return shards

    def write(self, name: str, tensor: torch.Tensor, row: int = 0) -> memoryview:
        """Write a tensor, or consecutive rows of it from `row` on, at its offset; return the bytes written."""
        data = raw_bytes(to_host(tensor))
        file, offset = self._locations[name]
        row_bytes = len(data) // tensor.shape[0] if tensor.dim() and tensor.shape[0] else 0
        begin = offset + row * row_bytes
        try:
            first, last = self._direct[file].write(data, begin) if file in self._direct else (0, 0)
        except OSError as error:
            raise disk_error(error, self.folder / file) from error
        write_all(self._descriptors[file], data[:first], begin, self.folder / file)
        write_all(self._descriptors[file], data[last:], begin + last, self.folder / file)
        return data

    def sync(self) -> None:
        """Wait until what was written is on the disk, where other machines find it."""
        for file, descriptor in self._descriptors.items():
            try:
                os.fsync(descriptor)
            except OSError as error:
                raise disk_error(error, self.folder / file) from error

    def close(self) -> None:
        """Close the files; one that an interruption kept it from is not closed twice, when its number is another's."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])
        while self._direct:
            self._direct.popitem()[1].close()
