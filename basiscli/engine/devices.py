"""Which device the work runs on, what it computes in there, and how it ends when memory runs out."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from basiscli.checkpoints.dtypes import torch_dtype
from basiscli.checkpoints.header import TensorSpec, commonest_dtype
from basiscli.errors import ResourceError

_M_MMAP_THRESHOLD = -3  # malloc.h


def choose_device(wish: str) -> torch.device:
    """Return the device for 'auto' or a device's name.

    Raises:
        ResourceError: if there is no such device.
    """
    if wish == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wish)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ResourceError(f"no device '{wish}': {str(error).splitlines()[0]}", remedy="--device cpu") from error
    return device


def working_dtype(device: torch.device, tensors: Iterable[TensorSpec]) -> torch.dtype:
    """Return what a model computes in: float32 on a CPU (faster there than bfloat16), else as it is stored."""
    if device.type == "cpu":
        return torch.float32
    stored = torch_dtype(commonest_dtype(tensors))
    return stored if stored.is_floating_point else torch.float32


def ran_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says so; the CPU's allocator and the GPU's libraries raise a plain RuntimeError."""
    said = ("allocate memory", "_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in said)


def keep_small_blocks() -> None:
    """Have freed tensors of more than 8 MB go back to the system at once, for the rest of the process.

    Where the C library can be told to. glibc keeps blocks of up to 32 MB, and those that lie below others in use for
    ever; of a model that streams through, that comes to more than its layers. Smaller blocks are worth keeping: the
    pages of a new one cost more than most of what is done with them. `give_back_memory` is for these.
    """
    _libc("mallopt", _M_MMAP_THRESHOLD, 1 << 23)


def give_back_memory() -> None:
    """Have what was freed go back to the system, where the C library can be told to."""
    _libc("malloc_trim", 0)


def _libc(name: str, *arguments: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
    if function is not None:
        function(*arguments)


@contextmanager
def within_memory(remedy: str) -> Iterator[None]:
    """Run what may need more memory than there is.

    Raises:
        ResourceError: it did.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        raise ResourceError("out of memory", remedy=remedy) from error
