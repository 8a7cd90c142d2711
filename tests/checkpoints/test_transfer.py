"""Through pinned memory to a GPU and back: the logic, with the CPU in the GPU's place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from basiscli.checkpoints import transfer
from basiscli.checkpoints.source import Source
from basiscli.checkpoints.transfer import read_to, to_host
from basiscli.checkpoints.views import Checkpoint

CPU = torch.device("cpu")


class Stream:
    """Stands for a stream of a GPU."""

    waited = 0

    def synchronize(self) -> None:
        Stream.waited += 1


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Take the GPU's way on the CPU in small pieces; the shapes of the pinned ones are noted."""
    pinned: list[tuple[int, ...]] = []
    empty = torch.empty

    def unpinned(shape: Any, *, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        if pin_memory:
            pinned.append(tuple(shape))
        return empty(shape, **options)

    monkeypatch.setattr(transfer, "_is_gpu", lambda device: True)
    monkeypatch.setattr(transfer, "PIECE_ELEMENTS", 100)
    monkeypatch.setattr(torch, "empty", unpinned)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    return pinned


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "scalar": (),
        "empty": (0, 4),
        "vector": (250,),
        "row": (1, 300),
        "matrix": (37, 30),
        "conv": (5, 3, 4, 4),
    }
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    return Checkpoint.open(Source("model", tmp_path / "model.safetensors"))


@pytest.mark.parametrize("rows", [None, slice(0, 3), slice(2, 5), slice(30, 37)])
@pytest.mark.parametrize("name", ["scalar", "empty", "vector", "row", "matrix", "conv"])
def test_pieces_make_up_the_tensor(
    staged: list[tuple[int, ...]], checkpoint: Checkpoint, name: str, rows: slice | None
) -> None:
    expected = checkpoint.read(name, rows)
    seen: list[bytes] = []
    found = read_to(CPU, checkpoint, name, rows, lambda data: seen.append(bytes(data)))
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)
    assert b"".join(seen) == expected.view(-1).view(torch.uint8).numpy().tobytes()
    assert all(torch.Size(shape).numel() <= 300 for shape in staged)  # a row at least
    if name == "matrix" and rows is None:
        assert staged == [(3, 30)] * 12 + [(1, 30)]


def test_small_results_come_back_pinned_when_they_are_there(staged: list[tuple[int, ...]]) -> None:
    before, values = Stream.waited, torch.arange(90.0).view(9, 10)
    assert torch.equal(to_host(values), values)
    assert staged == [(9, 10)] and Stream.waited == before + 1
    assert torch.equal(to_host(torch.ones(101)), torch.ones(101)) and len(staged) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_same_bytes(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PIECE_ELEMENTS", 100)
    for name in checkpoint.tensors:
        there = read_to(torch.device("cuda"), checkpoint, name)
        assert there.is_cuda and torch.equal(there.cpu(), checkpoint.read(name))
        assert torch.equal(to_host(there), checkpoint.read(name))
