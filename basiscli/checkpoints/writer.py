"""Writing safetensors in place: planned, pre-allocated, resumable, atomic.

The plan knows every dtype and shape, so each shard's header is written and the file extended to its full size before
any tensor exists; tensors are then written at their offsets in any order. All of it happens in `OUT.partial/`, where a
journal records each finished tensor with its digest. Renaming the folder to `OUT` is the last step.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from basiscli.checkpoints.digests import stored_digest
from basiscli.checkpoints.direct import DirectFile
from basiscli.checkpoints.dtypes import raw_bytes
from basiscli.checkpoints.header import StoredTensor, TensorSpec, encode_header, read_header
from basiscli.checkpoints.layout import METADATA, Layout, Shard
from basiscli.checkpoints.transfer import to_host
from basiscli.errors import InputError, ResourceError, UsageError

if TYPE_CHECKING:
    import torch

JOURNAL = "journal.jsonl"
SCRATCH = "scratch"
REPORT = "basis_report.json"


def partial_folder(out: Path) -> Path:
    """Return where an output is while it is being written."""
    return out.with_name(f"{out.name}.partial")


def replaced_folder(out: Path) -> Path:
    """Return where an earlier output is while a new one takes its name."""
    return out.with_name(f"{out.name}.replaced")


class Shards:
    """The files of an output while they are being filled, and the scratch space beside them."""

    def __init__(self, out: Path, layout: Layout) -> None:
        self.out, self.layout = out, layout
        self.folder = partial_folder(out)
        self.scratch = self.folder / SCRATCH
        self._places = _places(layout)
        self._descriptors: dict[str, int] = {}
        self._direct: dict[str, DirectFile] = {}

    @classmethod
    def join(cls, out: Path, layout: Layout, fingerprint: str) -> Shards:
        """Open the files of a run on another machine, whose journal stays its own.

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
        """Write a tensor, or consecutive rows of it from `row` on, at its place; return the bytes that were written."""
        data = raw_bytes(to_host(tensor))
        file, offset = self._places[name]
        row_bytes = len(data) // tensor.shape[0] if tensor.dim() and tensor.shape[0] else 0
        begin = offset + row * row_bytes
        try:
            first, last = self._direct[file].write(data, begin) if file in self._direct else (0, 0)
        except OSError as error:
            raise _disk_error(error, self.folder / file) from error
        _write_all(self._descriptors[file], data[:first], begin, self.folder / file)
        _write_all(self._descriptors[file], data[last:], begin + last, self.folder / file)
        return data

    def sync(self) -> None:
        """Wait until what was written is on the disk, where other machines find it."""
        for file, descriptor in self._descriptors.items():
            try:
                os.fsync(descriptor)
            except OSError as error:
                raise _disk_error(error, self.folder / file) from error

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
        for direct in self._direct.values():
            direct.close()
        self._direct.clear()


class PartialOutput(Shards):
    """`OUT.partial/`: shards being filled, the journal of what is finished, and scratch space."""

    def __init__(self, out: Path, layout: Layout, fingerprint: str, *, resume: bool) -> None:
        """Take up an interrupted run with the same fingerprint, or begin anew.

        Raises:
            UsageError: if another process is writing this output.
            ResourceError: if the disk cannot hold it.
        """
        super().__init__(out, layout)
        self.finished: dict[str, dict[str, Any]] = {}
        self.resumed = 0
        """Number of pieces of work that an earlier run left finished."""
        self._lock = threading.Lock()
        self._journal = self._lock_journal()
        try:
            if not (resume and self._take_up(fingerprint)):
                self._begin(fingerprint)
            for shard in layout.shards:
                self._open(shard)
        except OSError as error:
            self.close()
            raise _disk_error(error, self.folder) from error

    def allocate(self, layout: Layout) -> None:
        """Make the files of an output whose shapes only the work itself could tell; it had an empty layout before.

        Raises:
            ResourceError: if the disk cannot hold it.
        """
        self.layout, self._places = layout, _places(layout)
        try:
            for shard in layout.shards:
                self._make(shard)
                self._open(shard)
        except OSError as error:
            raise _disk_error(error, self.folder) from error

    def digest_on_disk(self, name: str) -> str:
        """Return the digest of a tensor's bytes as they are in the file."""
        spec, (file, offset) = self.layout.tensors[name], self._places[name]
        return stored_digest(StoredTensor(name, spec.dtype, spec.shape, self.folder / file, offset))

    def record(self, key: str, entry: dict[str, Any]) -> None:
        """Note in the journal that a piece of work is finished."""
        line = (json.dumps({"key": key, **entry}) + "\n").encode()
        with self._lock:
            try:
                # One write of one line: a killed process leaves whole lines and at most one broken last one.
                written = os.write(self._journal, line)
            except OSError as error:
                raise _disk_error(error, self.folder / JOURNAL) from error
            if written < len(line):
                raise _disk_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), self.folder / JOURNAL)
            self.finished[key] = entry

    def commit(self, files: Mapping[str, bytes], *, overwrite: bool) -> None:
        """Check the shards' structure, add the other files, sync everything and give the folder its name."""
        for shard in self.layout.shards:
            header = read_header(self.folder / shard.file)
            missing = {t.name for t in shard.tensors} ^ set(header.tensors)
            if missing:
                raise InputError(
                    "the written shard is not as planned", file=self.folder / shard.file, tensor=min(missing)
                )
        indexes = {name: (json.dumps(index, indent=2) + "\n").encode() for name, index in self.layout.indexes().items()}
        files = {**files, **indexes}
        try:
            for name, content in files.items():
                target = self.folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
                _sync(target)
            self.sync()
            for folder in {(self.folder / name).parent for name in [*files, *self._descriptors]} | {self.folder}:
                _sync(folder)
            self._take_the_name(overwrite)
            # Last, so that a process killed before the renaming finds all its work again.
            shutil.rmtree(self.out / SCRATCH, ignore_errors=True)
            (self.out / JOURNAL).unlink()
            self.close()
        except OSError as error:
            raise _disk_error(error, self.folder) from error

    def discard(self) -> None:
        """Remove everything that was written."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Close the files and let go of the lock; what is finished stays for the next run."""
        super().close()
        os.close(self._journal)
        self._journal = os.open(os.devnull, os.O_WRONLY)

    def _take_the_name(self, overwrite: bool) -> None:
        old = replaced_folder(self.out)
        if overwrite and self.out.exists():
            shutil.rmtree(old, ignore_errors=True)
            self.out.rename(old)
        self.folder.rename(self.out)
        with suppress(OSError):  # the output is there; whether its name outlives a power cut is the disk's business
            _sync(self.out.parent)
        shutil.rmtree(old, ignore_errors=True)

    def _lock_journal(self) -> int:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder / JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise _disk_error(error, self.folder) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            raise UsageError(
                "another basis process is writing this output",
                file=self.folder,
                remedy="wait for it, or choose another -o",
            ) from error
        return descriptor

    def _take_up(self, fingerprint: str) -> bool:
        """Load the journal of an interrupted run of the same plan; False if there is none."""
        lines = (self.folder / JOURNAL).read_bytes().split(b"\n")
        try:
            if json.loads(lines[0]) != {"fingerprint": fingerprint}:
                return False
        except ValueError:
            return False
        for shard in self.layout.shards:
            file = self.folder / shard.file
            if not file.is_file() or file.stat().st_size != shard.nbytes:
                return False
        for line in lines[1:-1]:  # what follows the last newline is a line that was cut off
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            self.finished[entry.pop("key")] = entry
        if lines[-1]:
            os.write(self._journal, b"\n")  # so that the next line does not join the broken one
        self.resumed = len(self.finished)
        return True

    def _begin(self, fingerprint: str) -> None:
        for entry in self.folder.iterdir():
            if entry.name != JOURNAL:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        os.ftruncate(self._journal, 0)
        self.scratch.mkdir()
        for shard in self.layout.shards:
            self._make(shard)
        # The journal's first line comes last: without it nothing here counts.
        os.write(self._journal, (json.dumps({"fingerprint": fingerprint}) + "\n").encode())

    def _open(self, shard: Shard) -> None:
        file = self.folder / shard.file
        self._descriptors[shard.file] = os.open(file, os.O_RDWR)
        self._direct[shard.file] = DirectFile(file)

    def _make(self, shard: Shard) -> None:
        (self.folder / shard.folder).mkdir(exist_ok=True)
        descriptor = os.open(self.folder / shard.file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # Claims the blocks, so that a full disk is found now and not after an hour.
            os.posix_fallocate(descriptor, 0, shard.nbytes)
            os.pwrite(descriptor, shard.header[0], 0)
        finally:
            os.close(descriptor)


def _places(layout: Layout) -> dict[str, tuple[str, int]]:
    """Return each tensor's file and offset in it."""
    return {t.name: (shard.file, shard.header[1][t.name]) for shard in layout.shards for t in shard.tensors}


def write_file(file: Path, tensors: Iterable[TensorSpec], data: Iterable[torch.Tensor]) -> str:
    """Write a safetensors file from front to back (scratch results); return the digest of its bytes.

    Args:
        file: the file to make.
        tensors: what it holds, in order.
        data: their data in the same order, each tensor whole or in consecutive rows.
    """
    header, _ = encode_header(tensors, METADATA)
    state, position = hashlib.sha256(header), len(header)
    # Under its name only when it is whole: a worker that was given up for lost may still be writing the same file.
    unfinished = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
    try:
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except OSError as error:
        raise _disk_error(error, file) from error
    try:
        _write_all(descriptor, memoryview(header), 0, file)
        for part in data:
            chunk = raw_bytes(to_host(part))
            _write_all(descriptor, chunk, position, file)
            state.update(chunk)
            position += len(chunk)
        unfinished.replace(file)
    finally:
        os.close(descriptor)
        unfinished.unlink(missing_ok=True)
    return state.hexdigest()


def _write_all(descriptor: int, data: memoryview, offset: int, file: Path) -> None:
    position = 0
    while position < len(data):
        try:
            position += os.pwrite(descriptor, data[position:], offset + position)
        except OSError as error:
            raise _disk_error(error, file) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_error(error: OSError, path: Path) -> ResourceError:
    return ResourceError(
        f"cannot write: {error.strerror or error}",
        file=path,
        remedy="free some space or choose another -o; the same command goes on where this one stopped",
    )
