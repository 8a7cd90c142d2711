"""Threads and the devices they compute on: sharing them, their memory, and what happens when it runs out."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import basiscli
from basiscli.engine import streams
from basiscli.engine.devices import ran_out_of_memory
from basiscli.engine.memory import MemoryBudget
from basiscli.engine.streams import budget_bytes, devices_of, exact_arithmetic
from basiscli.engine.tasks import Task
from basiscli.engine.threads import Threads
from basiscli.progress import Silent
from tests.conftest import read_checkpoint

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Noting(Silent):
    """Keeps what is said beside the bar."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def tasks(count: int, workspace: int = 1) -> list[Task]:
    return [Task(f"t{n}", 1, workspace, (n,)) for n in range(count)]


class Run:
    """A run whose tasks fit one kind of device only, and that alone where so many come side by side at first."""

    def __init__(self, device: torch.device, *, fits: str, crowd: int = 0) -> None:
        self.device, self.fits = device, fits
        self.met = threading.Barrier(crowd) if crowd else None
        self.running, self.lock = 0, threading.Lock()
        self.begun: set[int] = set()
        self.where: list[str] = []

    def do(self, number: int) -> dict[str, Any]:
        with self.lock:
            first = self.met is not None and number < self.met.parties and number not in self.begun
            self.begun.add(number)
            self.running += 1
        try:
            if first and self.met is not None:
                self.met.wait(30)
            crowded = first or (self.met is not None and self.running > 1)
            if self.device.type != self.fits or crowded:
                raise torch.OutOfMemoryError("CUDA out of memory")
            self.where.append(self.device.type)
            return {"number": number}
        finally:
            with self.lock:
                self.running -= 1


def finish(run: Run, engine: Threads, count: int = 8) -> tuple[dict[str, Any], list[str]]:
    done: dict[str, Any] = {}
    progress = Noting()
    engine.run_tasks(tasks(count), run.do, done.__setitem__, progress=progress, what="test")
    return done, progress.said


def test_tasks_that_do_not_fit_side_by_side_run_alone() -> None:
    engine = Threads(4)
    done, said = finish(Run(CPU, fits="cpu", crowd=4), engine)
    assert sorted(done) == [f"t{n}" for n in range(8)]
    assert len(said) >= 4 and said == engine.notes and all("was done again, alone" in text for text in said)


def test_what_does_not_fit_a_device_is_done_on_the_cpu() -> None:
    run, engine = Run(torch.device("meta"), fits="cpu"), Threads(2)
    done, _ = finish(run, engine, 3)
    assert len(done) == 3 and run.where == ["cpu"] * 3
    assert run.device == torch.device("meta"), "the run itself keeps its device"
    assert sum("was done on the CPU" in text for text in engine.notes) == 3


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnXsyevBatched`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED"), False),
    ],
)
def test_how_a_lack_of_memory_is_told(error: BaseException, said: bool) -> None:
    assert ran_out_of_memory(error) is said


def test_what_fits_nowhere_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        finish(Run(CPU, fits="nothing"), Threads(3))
    with pytest.raises(torch.OutOfMemoryError):
        finish(Run(torch.device("meta"), fits="nothing"), Threads(3))


def test_other_errors_are_not_tried_again() -> None:
    calls: list[int] = []

    def do(number: int) -> dict[str, Any]:
        calls.append(number)
        raise RuntimeError("the matrix is singular")

    with pytest.raises(RuntimeError, match="singular"):
        Threads(1).run_tasks(tasks(3), do, lambda key, entry: None, progress=Silent(), what="test")
    assert len(calls) == 1


def test_an_error_ends_threads_that_wait_for_memory() -> None:
    started = threading.Event()

    def do(number: int) -> dict[str, Any]:
        if number == 0:
            started.wait(5)
            time.sleep(0.05)  # the other waits for memory by now
            raise ValueError("first")
        return {}

    work = [Task("large", 1, 1 << 40, (0,)), Task("small", 1, 1 << 39, (1,))]
    started.set()
    with pytest.raises(ValueError, match="first"):
        Threads(2).run_tasks(work, do, lambda key, entry: None, progress=Silent(), what="test")


def test_several_gpus_share_the_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    here = threading.local()
    used: Counter[str] = Counter()

    @contextmanager
    def on_device(device: torch.device | None) -> Iterator[None]:
        here.device = device
        yield

    met = threading.Barrier(6)

    def do(number: int) -> dict[str, Any]:
        if number < 6:
            met.wait(30)  # so that every thread gets one
        used[str(here.device)] += 1
        return {}

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(streams, "on_device", on_device)
    monkeypatch.setattr(streams, "budget_bytes", lambda device, least: least)
    done: list[str] = []
    Threads(6, devices_of(GPU)).run_tasks(tasks(60), do, lambda k, e: done.append(k), progress=Silent(), what="")
    assert len(done) == 60
    assert set(used) == {"cuda:0", "cuda:1", "cuda:2"} and min(used.values()) >= 2
    assert devices_of(torch.device("cuda:1")) == [torch.device("cuda:1")]
    assert devices_of(CPU) == [CPU]


def test_a_gpus_room_is_most_of_its_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    assert budget_bytes(torch.device("cuda:0"), 7) == 800
    assert budget_bytes(CPU, 7) == budget_bytes(None, 7) == 7


def precisions() -> tuple[str, str]:
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision


@pytest.mark.parametrize("newer", [False, True])
def test_products_are_exact_inside_and_as_before_outside(newer: bool) -> None:
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has the older way alone")
    before, threads = precisions(), torch.get_num_threads()
    try:
        if newer:
            matmul.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision("high")
        torch.set_num_threads(2)
        chosen = precisions()
        with exact_arithmetic():
            assert precisions() == ("ieee", "ieee")
            assert torch.get_num_threads() == 1
        assert precisions() == chosen and chosen[0] == "tf32" and torch.get_num_threads() == 2
        assert newer or torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_num_threads(threads)
        matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = before


def test_one_alone_waits_for_the_others_and_keeps_new_ones_out() -> None:
    room, order = MemoryBudget(10), list[str]()
    inside, leave = threading.Event(), threading.Event()

    def sharing(name: str) -> None:
        with room.acquire(5, lambda: False) as held:
            assert held
            order.append(name)
            inside.set()
            leave.wait(5)

    first = threading.Thread(target=sharing, args=("first",))
    first.start()
    inside.wait(5)

    def lonely() -> None:
        with room.exclusive():
            order.append("alone")

    second = threading.Thread(target=lonely)
    second.start()
    while not room._reserved:
        time.sleep(0.001)
    third = threading.Thread(target=sharing, args=("third",))  # there is room, but one waits to be alone
    third.start()
    time.sleep(0.02)
    assert order == ["first"]
    leave.set()
    for thread in (first, second, third):
        thread.join(5)
    assert order == ["first", "alone", "third"]


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("method", ["linear", "ties", "ortho"])
def test_a_gpu_gives_the_same_bytes_for_any_number_of_workers(
    family: dict[str, Path], tmp_path: Path, method: str
) -> None:
    options = {"method": method, "base": family["base"], "device": "cuda"}
    found = [
        read_checkpoint(basiscli.merge([family["a"], family["b"]], output=tmp_path / str(n), workers=n, **options).path)
        for n in (1, 4)
    ]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@needs_gpu
def test_threads_have_streams_of_their_own() -> None:
    streams: set[int] = set()
    barrier = threading.Barrier(3)

    def do(number: int) -> dict[str, Any]:
        barrier.wait(10)
        streams.add(torch.cuda.current_stream().cuda_stream)
        return {}

    Threads(3, devices_of(GPU)[:1]).run_tasks(tasks(3), do, lambda k, e: None, progress=Silent(), what="")
    assert len(streams) == 3 and torch.cuda.default_stream().cuda_stream not in streams
