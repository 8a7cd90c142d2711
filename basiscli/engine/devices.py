"""Choosing a device and its compute dtype, and handling of memory: errors when it runs out, returning it when freed."""

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


def choose_device(name: str) -> torch.device:
    """Return the device of a name such as 'cpu' or 'cuda:1'; for 'auto' CUDA where there is a GPU, else the CPU.

    Raises:
        ResourceError: there is no such device, or it does not work.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ResourceError(f"no device '{name}': {str(error).splitlines()[0]}", remedy="--device cpu") from error
    return device


def working_dtype(device: torch.device, tensors: Iterable[TensorSpec]) -> torch.dtype:
    """Return the dtype for running a model: float32 on a CPU (faster there than bfloat16), else its commonest one."""
    if device.type == "cpu":
        return torch.float32
    stored = torch_dtype(commonest_dtype(tensors))
    return stored if stored.is_floating_point else torch.float32


def ran_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means out of memory, on the CPU or a GPU.

    torch's OutOfMemoryError is one of several: the CPU's allocator and the GPU's libraries raise a plain RuntimeError.
    """
    said = ("allocate memory", "_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in said)


def return_large_blocks() -> None:
    """Make freed tensors of more than 8 MB return to the system at once, for the rest of the process.

    It sets malloc's mmap threshold, where the C library has one. glibc keeps blocks of up to 32 MB, and those that lie
    below others in use for ever; of a model that streams through, that comes to more than its layers. Smaller blocks
    are worth keeping: the pages of a new one cost more than most of what is done with them. `trim_memory` returns them.
    """
    _libc("mallopt", _M_MMAP_THRESHOLD, 1 << 23)


def trim_memory() -> None:
    """Return freed memory of this process to the system (malloc_trim), where the C library can."""
    _libc("malloc_trim", 0)


def _libc(name: str, *arguments: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
    if function is not None:
        function(*arguments)


@contextmanager
def explain_out_of_memory(remedy: str) -> Iterator[None]:
    """Turn an out-of-memory error of the block into a `ResourceError` with advice.

    Raises:
        ResourceError: the block ran out of memory; `remedy` is what the user is told to do.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        raise ResourceError("out of memory", remedy=remedy) from error
