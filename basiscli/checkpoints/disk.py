"""Writing to a disk, with errors that name the file and say how to go on."""

from __future__ import annotations

import os
from pathlib import Path

from basiscli.errors import ResourceError


def write_all(descriptor: int, data: memoryview, offset: int, file: Path) -> None:
    """Write all of the data at an offset of an open file.

    Raises:
        ResourceError: the disk is full or fails.
    """
    position = 0
    while position < len(data):
        try:
            position += os.pwrite(descriptor, data[position:], offset + position)
        except OSError as error:
            raise disk_error(error, file) from error


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_error(error: OSError, path: Path) -> ResourceError:
    """Return the error to raise for one of the system's: it names the file, and how to go on."""
    return ResourceError(
        f"cannot write: {error.strerror or error}",
        file=path,
        remedy="free some space or choose another -o; the same command goes on where this one stopped",
    )
