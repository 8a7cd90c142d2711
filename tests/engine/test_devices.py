"""Devices: which one is taken, what happens when its memory runs out, and that a GPU gives the same numbers."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import basiscli
from basiscli.commands.merge.reader import TensorReader
from basiscli.engine.devices import choose_device
from basiscli.engine.tasks import Task
from basiscli.engine.threads import Threads, peak_workspace
from basiscli.progress import Silent
from tests.conftest import read_checkpoint


def test_auto_takes_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("cuda")


@pytest.mark.parametrize("method", ["ortho", "linear"])
def test_out_of_memory_leaves_the_work_for_the_next_run(
    family: dict[str, Path], tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, reads = TensorReader._fetch, 0

    def exhausted(self: TensorReader, *words: Any) -> torch.Tensor:
        nonlocal reads
        reads += 1
        if reads > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read(self, *words)

    options = {"method": method, "base": family["base"], "output": tmp_path / "out", "workers": 1}
    with monkeypatch.context() as patch:
        patch.setattr(TensorReader, "_fetch", exhausted)
        with pytest.raises(basiscli.ResourceError, match="out of memory") as caught:
            basiscli.merge([family["a"], family["b"]], **options)
    assert "--device cpu" in (caught.value.remedy or "")
    assert not (tmp_path / "out").exists()
    assert basiscli.merge([family["a"], family["b"]], **options).report.cost.resumed_steps > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ["ortho", "linear", "task_arithmetic"])
def test_a_gpu_gives_the_same_numbers(family: dict[str, Path], tmp_path: Path, method: str) -> None:
    results = {
        device: basiscli.merge(
            [family["a"], family["b"]], method=method, base=family["base"], device=device, output=tmp_path / device
        )
        for device in ("cpu", "cuda")
    }
    expected = read_checkpoint(results["cpu"].path)
    for name, tensor in read_checkpoint(results["cuda"].path).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    assert results["cuda"].report.cost.device.startswith("cuda")


def test_tasks_together_stay_within_the_budget() -> None:
    lock, running, most = threading.Lock(), list[int](), [0]

    def work(size: int) -> dict[str, int]:
        with lock:
            running.append(size)
            most[0] = max(most[0], sum(running))
        time.sleep(0.002)
        with lock:
            running.remove(size)
        return {}

    sizes = [90, 60, 50, 40, 30, 20, 10] * 5
    tasks = [Task(str(n), 1, size, (size,)) for n, size in enumerate(sizes)]
    done: list[str] = []
    Threads(4, memory=100).run_tasks(tasks, work, lambda key, _: done.append(key), progress=Silent(), what="test")
    assert sorted(done, key=int) == [task.key for task in tasks]
    assert 90 < most[0] <= 100  # side by side, and no more than fits
    assert peak_workspace(sizes, 4, 100) == 100


def test_a_task_larger_than_the_budget_runs_alone() -> None:
    done: list[str] = []
    tasks = [Task(str(n), 1, size, ()) for n, size in enumerate([500, 80, 80])]
    Threads(3, memory=100).run_tasks(tasks, dict, lambda key, _: done.append(key), progress=Silent(), what="test")
    assert sorted(done) == ["0", "1", "2"]
    assert peak_workspace([500, 80, 80], 3, 100) == 500


def test_the_callers_threads_are_given_back(family: dict[str, Path], tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        basiscli.merge([family["a"], family["b"]], method="linear", output=tmp_path / "out")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
