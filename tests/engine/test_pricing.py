"""What `--dry-run` says of checkpoints that are known by their headers alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

import basiscli
from basiscli.checkpoints.header import encode_header, read_header
from basiscli.commands.kv.plan import KVPlan
from basiscli.commands.merge.plan import MergePlan
from basiscli.errors import InputError, UsageError
from tests.conftest import LLAMA


def behead(folder: Path) -> Path:
    """Cut the data off every file of a checkpoint."""
    for file in folder.glob("*.safetensors"):
        raw = file.read_bytes()
        file.write_bytes(raw[: 8 + int.from_bytes(raw[:8], "little")])
    return folder


def headers(folder: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    from basiscli.checkpoints.header import TensorSpec

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    specs = [TensorSpec(name, "BF16", shape) for name, shape in shapes.items()]
    (folder / "model.safetensors").write_bytes(encode_header(specs, {"format": "pt"})[0])
    return folder


def test_headers_are_priced_as_the_checkpoints_they_are_of(family: dict[str, Path], tmp_path: Path) -> None:
    def price() -> dict[str, object]:
        plan = basiscli.plan_merge(
            [family["a"], family["b"]], method="ties", base=family["base"], output=tmp_path / "out", headers_only=True
        )
        plan.close()
        return plan.price().as_dict() | {"peak": plan.peak_bytes, "files": plan.layout.nbytes}

    whole = price()
    for folder in family.values():
        behead(folder)
    assert price() == whole


def test_headers_alone_are_for_dry_runs(family: dict[str, Path], tmp_path: Path, basis: Callable[..., Result]) -> None:
    behead(family["b"])
    words = ["merge", family["a"], family["b"], "-m", "linear", "-o", tmp_path / "out"]
    dry = basis(*words, "--dry-run", "--json")
    assert dry.exit_code == 0
    assert json.loads(dry.output)["price"]["flops"] > 0
    wet = basis(*words)
    assert wet.exit_code == 3
    assert "truncated" in wet.output
    plan = basiscli.plan_merge([family["a"], family["b"]], method="linear", output=tmp_path / "out", headers_only=True)
    assert isinstance(plan, MergePlan)
    with pytest.raises(UsageError, match="priced and not carried out"):
        basiscli.merge([family["a"], family["b"]], method="linear", output=tmp_path / "out", headers_only=True)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("cut", [-1, 1])
def test_a_byte_less_or_more_than_the_header_is_damage(family: dict[str, Path], cut: int) -> None:
    file = family["a"] / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[: 8 + int.from_bytes(raw[:8], "little") + cut])
    with pytest.raises(InputError, match="truncated"):
        read_header(file, headers_only=True)


def test_a_merge_larger_than_any_disk_here_is_priced(tmp_path: Path, basis: Callable[..., Result]) -> None:
    shapes = {f"model.layers.{n}.mlp.up_proj.weight": (1 << 16, 1 << 14) for n in range(2000)}
    models = [headers(tmp_path / name, shapes) for name in "ab"]
    result = basis("merge", *models, "-m", "linear", "-o", tmp_path / "out", "--dry-run")
    assert result.exit_code == 0
    assert "write 4.3 TB" in result.output
    assert " hours with " in result.output
    assert result.output.splitlines()[-1].startswith("8.59 TFLOP")  # two operations for each of 2 · 2000 · 2³⁰ elements


def test_operations_of_ortho_and_pissa_by_hand(tmp_path: Path) -> None:
    m, n, rank = 4096, 1024, 16
    shapes = {"model.layers.0.mlp.up_proj.weight": (m, n), "model.norm.weight": (n,)}
    base, a, b, c = (headers(tmp_path / name, shapes) for name in ("base", "a", "b", "c"))
    plan = basiscli.plan_merge([a, b, c], method="ortho", base=base, output=tmp_path / "out", headers_only=True)
    elements = m * n + n
    steps = 2 * (2 * m * n**2 * (2 / 3 + 3) + 9 * n**3)  # the first model is taken as it is
    assert math.isclose(plan.price().flops, 2 * 3 * elements + 2 * 16 * elements + steps)
    exact = basiscli.plan_init(a, rank=rank, exact=True, output=tmp_path / "out", headers_only=True)
    fast = basiscli.plan_init(a, rank=rank, output=tmp_path / "out", headers_only=True)
    assert math.isclose(exact.price().flops, 2 * m * n**2 + 9 * n**3 + 2 * m * n * rank)
    assert 0 < fast.price().flops < exact.price().flops / 5
    assert fast.price().seconds < exact.price().seconds


@pytest.mark.parametrize(("method", "exact"), [("eva", False), ("corda", True)])
def test_operations_of_calibration_by_hand(tmp_path: Path, method: str, exact: bool) -> None:
    """EVA offers twice the rank, and takes all eigenvectors of a moment of this size; CorDA decomposes the weight."""
    m, n, rank, tokens = 4096, 1024, 16, 2048
    model = headers(tmp_path / "model", {"model.layers.0.mlp.up_proj.weight": (m, n)})
    plan = basiscli.plan_init(
        model, method=method, rank=rank, exact=exact, tokens=tokens, output=tmp_path / "out", headers_only=True
    )
    products = tokens * (2 * m * n + n**2)  # of two inputs one is a moment of its own
    vectors = (11 * n**3 + 4 * n**2 * rank) / 2 if method == "eva" else 2 * m * n**2 + 9 * n**3 + 2 * m * n * rank
    assert math.isclose(plan.price().flops, products + vectors)


@pytest.mark.parametrize("tied", [True, False])
def test_operations_of_a_compressed_cache_by_hand(tmp_path: Path, tied: bool) -> None:
    """Each token of a training step passes three times: dense, projected, and back to the activations."""
    vocabulary, hidden, inner, length = 1000, 64, 256, 128
    model = headers(
        tmp_path / "model",
        {"model.embed_tokens.weight": (vocabulary, hidden), "model.layers.0.mlp.up_proj.weight": (inner, hidden)}
        | ({} if tied else {"lm_head.weight": (vocabulary, hidden)}),
    )
    shape = {"num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": hidden}
    (model / "config.json").write_text(json.dumps(LLAMA | shape))
    options = {"output": tmp_path / "out", "length": length, "workers": 1, "headers_only": True}

    def plan(**more: Any) -> KVPlan:
        return basiscli.plan_compress(model, kv_ratio=0.5, **options, **more)

    token = 2 * (vocabulary * hidden + inner * hidden)
    statistics = 2 * inner * hidden * length * 64  # without logits
    untrained = plan(train_steps=0, search="spectrum")
    assert math.isclose(untrained.price().flops, statistics)
    trained = plan(train_steps=10, batch=3, search="uniform")
    assert math.isclose(trained.price().flops, statistics + 3 * token * 10 * 3 * length)
    searched = plan(train_steps=0)
    rounds = 15 * (4 * 5 + 8) + 3 * 8  # of windows: four a round, five times, and eight held out; these to begin with
    assert math.isclose(searched.price().flops, statistics + token * length * rounds)
    weights = 4 * (vocabulary * hidden * (1 if tied else 2) + inner * hidden)
    kept = 4 * (4 * vocabulary + 8 * hidden + 4 * inner) * length
    assert untrained.peak_bytes == weights + kept
    assert trained.peak_bytes == weights + 3 * kept
    assert searched.peak_bytes == weights + 4 * kept + 8 * length * 4 * vocabulary


def test_more_workers_take_less_time(family: dict[str, Path], tmp_path: Path) -> None:
    times = []
    for workers in (1, 4):
        plan = basiscli.plan_merge(
            [family["a"], family["b"]], method="linear", output=tmp_path / "out", workers=workers
        )
        times.append(plan.price().hours)
        plan.close()
    assert math.isclose(times[0], 4 * times[1])


def test_more_memory_lets_large_matrices_go_side_by_side(tmp_path: Path, basis: Callable[..., Result]) -> None:
    weights = {f"model.layers.{n}.mlp.up_proj.weight": (8192, 8192) for n in range(8)}
    folders = [headers(tmp_path / name, weights) for name in ("base", "a", "b")]
    words = ["merge", *folders[1:], "--base", folders[0], "-m", "ortho", "-o", tmp_path / "out", "--workers", 8]

    def dry(*more: str) -> dict[str, float]:
        found = json.loads(basis(*words, "--dry-run", "--json", *more).output)
        return {"seconds": found["price"]["seconds"], "peak": found["peak_bytes"]}

    scarce, ample = dry(), dry("--memory", "100GB")
    assert ample["peak"] == 8 * scarce["peak"] > 8 * 4 * 8192**2
    assert 4 < scarce["seconds"] / ample["seconds"] <= 8
    assert dry("--memory", "1MB") == scarce, "one alone may take what it needs"
    refused = basis(*words, "--memory", "much")
    assert refused.exit_code == 2 and "not a size: 'much'" in refused.stderr
