"""Writing safetensors in place: planned, pre-allocated, resumable, atomic.

The plan knows every dtype and shape, so each shard's header is written and the file extended to its full size before
any tensor exists; tensors are then written at their offsets in any order. All of it happens in `OUT.partial/`, where a
journal records each finished tensor with its digest. Renaming the folder to `OUT` is the last step.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from basiscli.checkpoints.digests import stored_digest
from basiscli.checkpoints.direct import DirectFile
from basiscli.checkpoints.disk import disk_error, sync
from basiscli.checkpoints.header import StoredTensor, read_header
from basiscli.checkpoints.layout import Layout, Shard
from basiscli.checkpoints.shards import JOURNAL, SCRATCH, Shards, replaced_folder
from basiscli.errors import InputError, UsageError


class PartialOutput(Shards):
    """`OUT.partial/`: shards being filled, the journal of what is finished, and scratch space.

    A run is a loop that may be stopped anywhere, and goes on there when it is started again:

        output = PartialOutput(out, layout, fingerprint, resume=True)
        for name in layout.tensors:
            if name not in output.finished:
                data = output.write(name, make(name))
                output.record(name, {"digests": {name: digest([data])}})
        output.commit({"config.json": config}, overwrite=False)
    """

    def __init__(self, out: Path, layout: Layout, fingerprint: str, *, resume: bool) -> None:
        """Take up an interrupted run with the same fingerprint, or begin anew (always without `resume`).

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
            raise disk_error(error, self.folder) from error

    def allocate(self, layout: Layout) -> None:
        """Make the files of an output whose shapes only the work itself could tell; it had an empty layout before.

        Raises:
            ResourceError: if the disk cannot hold it.
        """
        self.layout, self._locations = layout, layout.locations()
        try:
            for shard in layout.shards:
                self._make(shard)
                self._open(shard)
        except OSError as error:
            raise disk_error(error, self.folder) from error

    def digest_on_disk(self, name: str) -> str:
        """Return the SHA-256 of a tensor's bytes, in hexadecimal, as they are in the file."""
        spec, (file, offset) = self.layout.tensors[name], self._locations[name]
        return stored_digest(StoredTensor(name, spec.dtype, spec.shape, self.folder / file, offset))

    def forget_damaged(self) -> None:
        """Forget work whose tensors on the disk are not those of the journal, as after a power cut.

        Entries say what they wrote as `digests`: the SHA-256 of tensors by name.
        """
        for key, entry in list(self.finished.items()):
            if any(self.digest_on_disk(name) != sha256 for name, sha256 in entry.get("digests", {}).items()):
                del self.finished[key]

    def record(self, key: str, entry: dict[str, Any]) -> None:
        """Add a line to the journal: the piece of work `key` is finished, with its results in `entry`."""
        line = (json.dumps({"key": key, **entry}) + "\n").encode()
        with self._lock:
            try:
                # One write of one line: a killed process leaves whole lines and at most one broken last one.
                written = os.write(self._journal, line)
            except OSError as error:
                raise disk_error(error, self.folder / JOURNAL) from error
            if written < len(line):
                raise disk_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), self.folder / JOURNAL)
            self.finished[key] = entry

    def commit(self, files: Mapping[str, bytes], *, overwrite: bool) -> None:
        """Check the shards' structure, add the other files, sync everything and rename `OUT.partial` to `OUT`.

        Args:
            files: what lies beside the weights, by path within the output.
            overwrite: replace an output that is there.
        """
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
                sync(target)
            self.sync()
            for folder in {(self.folder / name).parent for name in [*files, *self._descriptors]} | {self.folder}:
                sync(folder)
            self._take_the_name(overwrite)
            # Last, so that a process killed before the renaming finds all its work again.
            shutil.rmtree(self.out / SCRATCH, ignore_errors=True)
            (self.out / JOURNAL).unlink()
            self.close()
        except OSError as error:
            raise disk_error(error, self.folder) from error

    def discard(self) -> None:
        """Remove `OUT.partial` and everything in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Close the files and let go of the lock; what is finished stays for the next run."""
        super().close()
        journal, self._journal = self._journal, os.open(os.devnull, os.O_WRONLY)
        os.close(journal)

    def _take_the_name(self, overwrite: bool) -> None:
        old = replaced_folder(self.out)
        if overwrite and self.out.exists():
            shutil.rmtree(old, ignore_errors=True)
            self.out.rename(old)
        self.folder.rename(self.out)
        with suppress(OSError):  # the output is there; whether its name outlives a power cut is the disk's business
            sync(self.out.parent)
        shutil.rmtree(old, ignore_errors=True)

    def _lock_journal(self) -> int:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder / JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise disk_error(error, self.folder) from error
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
