"""Direct writes (O_DIRECT), which bypass the page cache, where the system has them.

A merge writes as fast as it reads, and the kernel spends more processor time on finding pages for what is written than
on anything else it does for us. Direct writes need a block of the disk's own size, alignment and a buffer aligned
alike; what is left at both ends of a piece of data goes through the page cache. The two never touch the same page.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from contextlib import suppress
from pathlib import Path

_PAGE = 4096  # no file system in use asks for more
_BUFFER_BYTES = 1 << 20
_UNABLE = (errno.EINVAL, errno.EOPNOTSUPP)
_own = threading.local()  # an aligned buffer a thread


class DirectFile:
    """A file to which whole pages are written by O_DIRECT."""

    def __init__(self, file: Path) -> None:
        """Open an existing file; where the system has no O_DIRECT, `write` writes nothing."""
        self.descriptor: int | None = None
        with suppress(OSError):
            self.descriptor = os.open(file, os.O_WRONLY | os.O_DIRECT) if hasattr(os, "O_DIRECT") else None

    def write(self, data: memoryview, offset: int) -> tuple[int, int]:
        """Write the part of the data that fills whole pages at this offset; return its begin and end in the data.

        Raises:
            OSError: the disk is full or broken.
        """
        begin = -offset % _PAGE
        end = (offset + len(data)) // _PAGE * _PAGE - offset
        if self.descriptor is None or end <= begin:
            return 0, 0
        buffer = _buffer()
        position = begin
        try:
            while position < end:
                size = min(len(buffer), end - position)
                buffer[:size] = data[position : position + size]
                written = os.pwrite(self.descriptor, buffer[:size], offset + position)
                position += written
                if written % _PAGE:  # the next piece would not be aligned
                    break
        except OSError as error:
            if error.errno not in _UNABLE:
                raise
            self.close()
        return begin, position

    def close(self) -> None:
        """Close the file; `write` writes nothing from now on."""
        descriptor, self.descriptor = self.descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def _buffer() -> memoryview:
    if not hasattr(_own, "buffer"):
        _own.buffer = memoryview(mmap.mmap(-1, _BUFFER_BYTES))
    found: memoryview = _own.buffer
    return found
