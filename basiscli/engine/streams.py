"""Devices, CUDA streams and precision of a run's threads: each has its own stream, and no product is in TF32."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

_SHARE = 0.8  # of a GPU's free memory: workspaces are estimates, and libraries take some for themselves
_loading = threading.Lock()


def devices_of(device: torch.device) -> list[torch.device]:
    """Return the devices of a run: every GPU for 'cuda', one GPU for 'cuda:1', the CPU for 'cpu'."""
    if device.type == "cuda" and device.index is None:
        return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    return [device]


def budget_bytes(device: torch.device | None, cpu_bytes: int) -> int:
    """Return the bytes that tasks may take together on a device: 80 % of a GPU's free memory, `cpu_bytes` on a CPU."""
    if device is None or device.type != "cuda":
        return cpu_bytes
    torch.cuda.empty_cache()  # what an earlier run's streams left in torch's keeping is free, too
    free, _ = torch.cuda.mem_get_info(device)
    return int(_SHARE * free)


def _load_linear_algebra() -> None:
    """Have torch load a GPU's linear algebra: it does on first use, and fails where two threads come at once.

    "lazy wrapper should be called at most once" is all that the second thread is told (torch 2.11, on an H100).
    """
    with _loading:
        torch.linalg.eigvalsh(torch.eye(2, device="cuda"))


@contextmanager
def on_device(device: torch.device | None) -> Iterator[None]:
    """Make a GPU this thread's current CUDA device, with a new stream as its current one; nothing for a CPU."""
    if device is None or device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        _load_linear_algebra()
        yield


def same_stream() -> Callable[[], AbstractContextManager[Any]]:
    """Return a function that makes context managers in which another thread uses this thread's GPU and CUDA stream."""
    if not torch.cuda.is_initialized():
        return nullcontext
    stream = torch.cuda.current_stream()
    return lambda: torch.cuda.stream(stream)


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Compute with one thread a task, and float32 products in float32: no TF32 on a GPU, no bfloat16 on a CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _float32_products():
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _float32_products() -> Iterator[None]:
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # before torch 2.9
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
        return
    # The older way of asking is refused once a process has used the newer one.
    libraries: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    before = [library.fp32_precision for library in libraries]
    try:
        for library in libraries:
            library.fp32_precision = "ieee"
        yield
    finally:
        for library, precision in zip(libraries, before, strict=True):
            library.fp32_precision = precision


def free_cached() -> None:
    """Release the GPU memory that torch's allocator caches; nothing without a GPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def on_cpu(do: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]] | None:
    """Return a run's method bound to a copy of the run whose `device` is the CPU; None where it is the CPU already."""
    run = getattr(do, "__self__", None)
    if getattr(run, "device", None) in (None, torch.device("cpu")):
        return None
    elsewhere = copy.copy(run)
    elsewhere.device = torch.device("cpu")  # type: ignore[union-attr]
    found: Callable[..., dict[str, Any]] = getattr(elsewhere, do.__name__)
    return found
