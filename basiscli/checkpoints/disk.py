"""Writing and syncing files, with errors that name the file and a remedy."""

from __future__ import annotations

import os
from pathlib import Path

from basiscli.errors import ResourceError


def write_all(descriptor: int, data: memoryview, offset: int, file: Path) -> None:
    """Write all of the data to an open file, from a byte offset; `file` is its path for errors.

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
    """Call fsync on a file, or on a folder to make its entries durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_error(error: OSError, path: Path) -> ResourceError:
    """Return the `ResourceError` for an `OSError` on writing, with the file and a remedy."""
    return ResourceError(
        f"cannot write: {error.strerror or error}",
        file=path,
        remedy="free some space or choose another -o; the same command goes on where this one stopped",
    )
