"""Batches of tasks: how they are made up, done, recorded and taken up again, with the CPU in a GPU's place."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import basiscli
from basiscli.checkpoints.writer import PartialOutput
from basiscli.engine import batches
from basiscli.engine.batches import MAX_TASKS, do_task, in_batches
from basiscli.engine.tasks import Task
from basiscli.engine.threads import Threads
from basiscli.linalg import eigen
from basiscli.progress import Silent
from tests.conftest import LLAMA, read_checkpoint, write_checkpoint
from tests.init_models import llama, save
from tests.plugins.test_data_inits import write_tokens

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def task(key: str, workspace: int = 1) -> Task:
    return Task(key, 10, workspace, (key,))


def kind(task: Task) -> Hashable | None:
    """Tasks are alike whose names begin with the same letter; those with an x need no batch."""
    return None if task.key.startswith("x") else task.key[0]


def keys(tasks: list[Task]) -> list[list[str]]:
    return [[member.key for member in task.members] or [task.key] for task in tasks]


def test_what_is_alike_goes_together_in_its_order() -> None:
    tasks = [task(key) for key in ("a1", "b1", "x1", "a2", "x2", "b2", "a3", "c1")]
    made = in_batches(tasks, kind, device=GPU, done=())
    assert keys(made) == [["a1", "a2", "a3"], ["b1", "b2"], ["x1"], ["x2"], ["c1"]]
    assert (made[0].key, made[0].size, made[0].workspace) == ("a1", 30, 3)
    assert made[2] is tasks[2], "one alone stays as it is"


def test_a_cpu_makes_none() -> None:
    tasks = [task("a1"), task("a2"), task("a3")]
    assert in_batches(tasks, kind, device=CPU, done={"a2"}) == [tasks[0], tasks[2]]


def test_batches_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    many = [task(f"a{n:02}") for n in range(2 * MAX_TASKS + 1)]
    sizes = [len(names) for names in keys(in_batches(many, kind, device=GPU, done=()))]
    assert sizes == [MAX_TASKS, MAX_TASKS, 1]
    monkeypatch.setattr(batches, "MAX_WORKSPACE", 10)
    large = [task("a1", 4), task("a2", 4), task("a3", 4), task("a4", 50), task("a5", 1)]
    assert keys(in_batches(large, kind, device=GPU, done=())) == [["a1", "a2"], ["a3"], ["a4"], ["a5"]]


def test_what_is_done_does_not_change_them() -> None:
    tasks = [task(key) for key in ("a1", "a2", "b1", "b2", "x1", "x2")]
    left = in_batches(tasks, kind, device=GPU, done={"a2", "b1", "b2", "x1"})
    assert keys(left) == [["a1", "a2"], ["x2"]], "a batch of which anything is left is done as a whole"


def test_members_are_done_side_by_side_and_recorded_each() -> None:
    met = threading.Barrier(3)

    def do(key: str) -> dict[str, Any]:
        met.wait(30)
        return {"of": key}

    (batch,) = in_batches([task(f"a{n}") for n in range(3)], kind, device=GPU, done=())
    assert do_task(do, batch) == {f"a{n}": {"of": f"a{n}"} for n in range(3)}
    done: dict[str, Any] = {}
    Threads(1).run_tasks([batch], do, done.__setitem__, progress=Silent(), what="test")
    assert sorted(done) == ["a0", "a1", "a2"]


def test_the_error_of_one_is_the_batchs_and_ends_the_others() -> None:
    def do(key: str) -> dict[str, Any]:
        if key == "a1":
            raise ValueError("mine")
        eigen.eigh(torch.eye(3))  # would wait for the one that failed
        return {}

    (batch,) = in_batches([task(f"a{n}") for n in range(3)], kind, device=GPU, done=())
    with pytest.raises(ValueError, match="mine"):
        do_task(do, batch)


class Memory:
    """What a task that ran out of memory still held."""


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
def test_a_batch_that_does_not_fit_is_done_one_by_one() -> None:
    held: weakref.WeakSet[Memory] = weakref.WeakSet()
    running, most, lock = 0, 0, threading.Lock()
    together = threading.Barrier(3)
    crowded = True

    def do(key: str) -> dict[str, Any]:
        nonlocal running, most, crowded
        memory = Memory()
        with lock:
            held.add(memory)
            running += 1
            most = max(most, running)
        try:
            if crowded:
                together.wait(30)
                if key == "a2":
                    crowded = False
                    raise torch.OutOfMemoryError("CUDA out of memory")
                eigen.eigh(torch.eye(3))
            return {"of": key, "beside": len(held) - 1}
        finally:
            with lock:
                running -= 1

    (batch,) = in_batches([task(f"a{n}") for n in range(3)], kind, device=GPU, done=())
    engine, done = Threads(2), dict[str, Any]()
    engine.run_tasks([batch], do, done.__setitem__, progress=Silent(), what="test")
    assert most == 3 and {key: entry["beside"] for key, entry in done.items()} == {"a0": 0, "a1": 0, "a2": 0}
    assert engine.notes == ["a0, with 2 others in a batch, ran out of memory and was done again, alone"]


# Whole commands -------------------------------------------------------------------------------------------------------


@pytest.fixture
def batching(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have CPUs do batches, with results that depend on what goes together, as a GPU's do; returns their sizes."""
    plain, sizes = torch.linalg.eigh, list[int]()

    def together(matrix: Tensor) -> Any:
        values, vectors = plain(matrix)
        if matrix.dim() > 2:  # a batch
            sizes.append(len(matrix))
            turned = [1 + 1e-3 * len(matrix) + 1e-4 * place for place in range(len(matrix))]
            vectors = vectors * torch.tensor(turned, dtype=vectors.dtype)[:, None, None]
        return values, vectors

    monkeypatch.setattr(batches, "_BATCHING", frozenset({"cpu"}))
    monkeypatch.setattr(torch.linalg, "eigh", together)
    return sizes


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """A base of five layers, and two models made of it; q and o have one shape, up and down another."""

    def make(name: str, seed: int, scale: float) -> Path:
        generator = torch.Generator().manual_seed(seed)
        for key, shape in shapes.items():
            own[key] = own.get(key, 0) + scale * torch.randn(shape, generator=generator)
        return write_checkpoint(tmp_path / name, own, LLAMA)

    shapes = {"model.embed_tokens.weight": (40, 16), "model.norm.weight": (16,)}
    for n in range(5):
        layer = f"model.layers.{n}"
        shapes |= {f"{layer}.self_attn.{p}_proj.weight": (16, 16) for p in "qo"}
        shapes |= {f"{layer}.mlp.up_proj.weight": (24, 16), f"{layer}.mlp.down_proj.weight": (16, 24)}
    own: dict[str, Any] = {}
    base = make("base", 0, 1.0)
    return {"base": base, "a": make("a", 1, 0.1), "b": make("b", 2, 0.1)}


def command(models: dict[str, Path], name: str, out: Path, workers: int = 2, device: str = "cpu") -> dict[str, Tensor]:
    common: dict[str, Any] = {"output": out, "workers": workers, "device": device}
    base = models["base"]
    if name == "ortho":
        return read_checkpoint(basiscli.merge([models["a"], models["b"]], base=base, method="ortho", **common).path)
    if name == "extract":
        return load_file(basiscli.extract(models["a"], base=base, energy=0.6, exact=True, **common).path / ADAPTER)
    made = basiscli.init(base, method="pissa", rank=2, exact=True, **common)
    return load_file(made.path / "adapter" / ADAPTER) | read_checkpoint(made.path / "residual")


ADAPTER = "adapter_model.safetensors"
COMMANDS = ["ortho", "pissa", "extract"]


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_decompose_in_batches_with_the_same_bytes_for_any_workers(
    models: dict[str, Path], tmp_path: Path, batching: list[int], name: str
) -> None:
    found = [command(models, name, tmp_path / f"w{workers}", workers) for workers in (1, 2, 3)]
    assert sorted(batching) == [10] * 6, "two shapes, three runs"
    assert same(found[0], found[1]) and same(found[0], found[2])
    batching.clear()


@pytest.mark.parametrize("name", COMMANDS)
def test_they_are_what_they_are_alone(
    models: dict[str, Path], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = command(models, name, tmp_path / "alone")
    monkeypatch.setattr(batches, "_BATCHING", frozenset({"cpu"}))
    torch.testing.assert_close(command(models, name, tmp_path / "batches"), alone)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("steps", [1, 7, 12])
def test_an_interrupted_run_ends_with_the_same_bytes(
    models: dict[str, Path], tmp_path: Path, batching: list[int], name: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = command(models, name, tmp_path / "whole")
    record = PartialOutput.record

    def stop(self: PartialOutput, key: str, entry: dict[str, Any]) -> None:
        if len(self.finished) >= steps:  # in the middle of what a batch leaves behind
            raise KeyboardInterrupt
        record(self, key, entry)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(PartialOutput, "record", stop)
        with pytest.raises(KeyboardInterrupt):
            command(models, name, out, workers=1)
    assert not out.exists()
    batching.clear()
    assert same(whole, command(models, name, out))
    assert set(batching) == {10}


@pytest.mark.parametrize(("method", "sizes"), [("eva", {3}), ("corda", {2, 4})])
def test_inputs_of_a_layer_are_decomposed_together(
    tmp_path: Path, batching: list[int], method: str, sizes: set[int]
) -> None:
    """Three inputs of a Llama's layer are as wide as its hidden states: of q, k and v, of o, of gate and up.

    With `corda`, a product of each weight is decomposed: by 32 × 32 matrices of q, o, gate
    and up, by 16 × 16 of k and v.
    """
    model = save(llama, tmp_path / "model")
    text = write_tokens(tmp_path / "tokens.safetensors")
    options: dict[str, Any] = {"method": method, "rank": 4, "calibration": text, "length": 16, "exact": True}
    made = [
        load_file(basiscli.init(model, output=tmp_path / str(n), workers=n, **options).path / "adapter" / ADAPTER)
        for n in (1, 3)
    ]
    assert same(*made)
    assert set(batching) == sizes


def test_bytes_depend_on_what_goes_together_in_this_test(
    models: dict[str, Path], tmp_path: Path, batching: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the tests above compare would differ if batches did."""
    whole = command(models, "pissa", tmp_path / "whole")
    monkeypatch.setattr(batches, "MAX_TASKS", 4)
    assert not same(whole, command(models, "pissa", tmp_path / "smaller"))


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("name", ["ortho", "pissa"])
def test_a_gpu_gives_the_same_bytes_for_any_number_of_workers(
    models: dict[str, Path], tmp_path: Path, name: str
) -> None:
    found = [command(models, name, tmp_path / str(workers), workers, "cuda") for workers in (1, 5)]
    assert same(*found)
