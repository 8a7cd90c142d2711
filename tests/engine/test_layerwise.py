"""Inputs of linear layers, read layer by layer from the shards, against hooks on the whole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from basiscli.calibration.tokens import Windows
from basiscli.checkpoints.views import Checkpoint
from basiscli.engine.tensor_store import MemoryStore
from basiscli.engine.threads import Threads
from basiscli.errors import InputError
from basiscli.hub.resolve import resolve
from basiscli.model.moments import CalibrationTargets, MomentsRun
from basiscli.model.stored_moments import StoredMoments, add_rows, block_key, empty_sums, moment_blocks
from basiscli.progress import Silent
from basiscli.transforms import InputMoments
from tests import init_models, kv_models
from tests.init_models import load, save

MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: (lambda make=make: make()) for name, make in kv_models.ARCHITECTURES.items()},  # type: ignore[misc]
    "gpt2": init_models.gpt2,
    "bert": init_models.bert,
    "bert-classifier": init_models.bert_classifier,
}


def some_windows(*, padded: bool = False, count: int = 5, length: int = 24, vocabulary: int = 60) -> Windows:
    ids = torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(3))
    mask = None
    if padded:
        mask = torch.ones_like(ids)
        mask[1, 17:] = 0
        mask[3, 5:] = 0
    return Windows(ids, ids, mask, "random", "", None if mask is None else mask == 1)


def linear_names(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and "lm_head" not in n]


def expected_inputs(model: Any, windows: Windows, names: list[str]) -> dict[str, Tensor]:
    """Return what each module is called with, float64 [tokens, in], from one forward of the whole model."""
    rows: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            given = args[0]
            counted = windows.counted if windows.counted is not None and given.dim() == 3 else ...
            rows[name] = given[counted].flatten(0, -2).double()

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    with torch.no_grad():
        model(**windows.inputs)
    for hook in hooks:
        hook.remove()
    return rows


def layerwise(folder: Path, names: list[str], windows: Windows, workers: int = 1) -> dict[str, InputMoments]:
    checkpoint = Checkpoint.open(resolve(str(folder)))
    nowhere: Any = None
    run = MomentsRun(
        CalibrationTargets(checkpoint, {n: n for n in names}), nowhere, Silent(), torch.device("cpu"), Threads(workers)
    )
    found: dict[str, InputMoments] = {}
    for part in run.moments(windows):
        assert not found.keys() & part.keys()
        loaded = {stored: stored.load(run.device) for stored in part.values()}
        found |= {name: loaded[stored] for name, stored in part.items()}
        assert run._model is not None
        resident = [n for n, p in run._model.model.named_parameters() if p.device.type != "meta"]
        assert resident == [], "a layer stayed in memory"
    checkpoint.close()
    return found


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_moments_are_those_of_the_whole_model(tmp_path: Path, name: str, padded: bool) -> None:
    folder = save(MODELS[name], tmp_path / "model")
    windows, model = some_windows(padded=padded), load(folder)
    names = linear_names(model)
    found, expected = layerwise(folder, names, windows), expected_inputs(model, windows, names)
    assert found.keys() == expected.keys() == set(names)
    for module, rows in expected.items():
        moments = found[module]
        assert moments.count == len(rows)
        centred = rows - rows.mean(0)
        for got, wanted in ((moments.raw, rows.mT @ rows), (moments.centred, centred.mT @ centred)):
            assert (got - wanted).norm() <= 2e-6 * wanted.norm(), module


def test_modules_that_read_the_same_tensor_share_its_moments(tmp_path: Path) -> None:
    folder = save(init_models.llama, tmp_path / "model")
    found = layerwise(folder, linear_names(load(folder)), some_windows())
    groups = {name: id(moments) for name, moments in found.items()}
    attention, mlp = "model.layers.1.self_attn.", "model.layers.1.mlp."
    assert groups[f"{attention}q_proj"] == groups[f"{attention}k_proj"] == groups[f"{attention}v_proj"]
    assert groups[f"{mlp}gate_proj"] == groups[f"{mlp}up_proj"]
    assert len(set(groups.values())) == 8


@pytest.mark.parametrize("workers", [2, 3])
def test_moments_are_the_same_bits_for_any_number_of_workers(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("basiscli.model.layerwise._BATCH_TOKENS", 24)
    monkeypatch.setattr("basiscli.model.stored_moments._BAND", 10)
    folder = save(init_models.llama, tmp_path / "model")
    names, windows = linear_names(load(folder)), some_windows(padded=True, count=7)
    one, many = (layerwise(folder, names, windows, count) for count in (1, workers))
    assert one.keys() == many.keys() == set(names)
    for name, moments in one.items():
        assert moments.count == many[name].count
        for part in ("shift", "total", "second"):
            assert torch.equal(getattr(moments, part), getattr(many[name], part)), (name, part)


@pytest.mark.parametrize(("width", "band"), [(12, 512), (520, 512), (600, 32)])  # 1, 2, and 7 row blocks of 3 bands
def test_a_large_mean_takes_no_digits(width: int, band: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs of mean 1,000 and deviation 1: squares summed in float32 would leave no variance."""
    monkeypatch.setattr("basiscli.model.stored_moments._BAND", band)
    rows = 1000 + torch.randn(6000, width, generator=torch.Generator().manual_seed(0))
    exchange = MemoryStore()
    for strip in moment_blocks(width):
        sums = empty_sums(strip, rows[:777].mean(0))
        for part in rows.split(2777):
            add_rows(sums, strip, part)
        exchange.put(block_key("linear", strip), sums)
    moments = StoredMoments(exchange, "linear", width, len(rows)).load(torch.device("cpu"))
    wide = rows.double()
    centred = wide - wide.mean(0)
    expected = centred.mT @ centred
    assert (moments.centred - expected).norm() < 1e-6 * expected.norm()
    assert (moments.raw - wide.mT @ wide).norm() < 1e-9 * (wide.mT @ wide).norm()


def test_experts_that_become_one_parameter_are_refused(tmp_path: Path) -> None:
    folder = save(init_models.mixtral, tmp_path / "model")
    with pytest.raises(InputError, match=r"one module of several weights|not in the checkpoint as it is"):
        layerwise(folder, ["model.layers.0.block_sparse_moe.experts.0.w1"], some_windows())


def test_weights_with_nan_are_refused(tmp_path: Path) -> None:
    folder = save(init_models.llama, tmp_path / "model")
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="layer 0 gives NaN"):
        layerwise(folder, ["model.layers.1.mlp.up_proj"], some_windows())
