"""What every registered merge method must do, ours and anybody's alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import basiscli
from basiscli.registry import Registry
from tests.conftest import add, make_tensors, read_checkpoint, write_checkpoint

METHODS = Registry().names("merge")
everywhere = pytest.mark.parametrize("method", METHODS)
SHARED_PAGES = {
    "breadcrumbs_ties": "breadcrumbs",
    "dare_linear": "dare",
    "dare_ties": "dare",
    "della_linear": "della",
}
# What a method cannot do without, and what makes it do all it can.
PARAMETERS: dict[str, dict[str, Any]] = {
    "breadcrumbs": {"density": 0.5, "gamma": 0.1, "rescale": True},
    "breadcrumbs_ties": {"density": 0.5, "gamma": 0.1},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "della": {"density": 0.5},
    "della_linear": {"density": [0.5, 0.6], "epsilon": 0.2},
    "model_stock": {"filter_wise": True},
    "nearswap": {"t": 0.01},
    "nuslerp": {"nuslerp_flatten": False},
    "passthrough": {"scale": 1.0},
    "sce": {"select_topk": 0.5},
    "slerp": {"t": 0.3},
    "ties": {"density": [0.3, 0.6], "rescale": True},
}


def merge(folders: list[Path], base: Path, out: Path, method: str, **options: Any) -> basiscli.MergeResult:
    _, most = Registry().find("merge", method).models
    options = {"parameters": PARAMETERS.get(method, {})} | options
    return basiscli.merge(folders[:most], method=method, base=base, output=out, **options)


@everywhere
def test_identity_models_equal_to_the_base_give_the_base(tmp_path: Path, method: str) -> None:
    base = make_tensors(0)
    folders = [write_checkpoint(tmp_path / name, base) for name in ("base", "a", "b")]
    merged = read_checkpoint(merge(folders[1:], folders[0], tmp_path / "out", method).path)
    assert merged.keys() == base.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, base[name], rtol=1e-6, atol=1e-6)


@everywhere
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_results_have_the_storage_dtype_and_one_rounding(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    """The result in a narrow dtype is the float32 result of the same numbers, rounded once."""
    base = make_tensors(0, dtype)
    models = [add(base, make_tensors(seed)) for seed in (1, 2)]
    narrow = [write_checkpoint(tmp_path / f"n{i}", t) for i, t in enumerate([base, *models])]
    wide_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    wide = [
        write_checkpoint(tmp_path / f"w{i}", {n: x.to(wide_dtype) for n, x in t.items()})
        for i, t in enumerate([base, *models])
    ]
    found = read_checkpoint(merge(narrow[1:], narrow[0], tmp_path / "narrow", method).path)
    expected = read_checkpoint(merge(wide[1:], wide[0], tmp_path / "wide", method).path)
    for name, tensor in found.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name].to(dtype)), name


@everywhere
def test_same_bytes_for_any_number_of_workers(family: dict[str, Path], tmp_path: Path, method: str) -> None:
    digests = {
        merge([family["a"], family["b"]], family["base"], tmp_path / f"w{n}", method, workers=n).report.weights_digest
        for n in (1, 2, 4)
    }
    assert len(digests) == 1


@everywhere
def test_same_weights_for_any_shards_of_input_and_output(tmp_path: Path, method: str) -> None:
    base = make_tensors(0)
    models = [base, *(add(base, make_tensors(seed)) for seed in (1, 2))]
    whole = [write_checkpoint(tmp_path / f"one{i}", t) for i, t in enumerate(models)]
    cut = [write_checkpoint(tmp_path / f"cut{i}", t, shards=2 + i) for i, t in enumerate(models)]
    first = merge(whole[1:], whole[0], tmp_path / "a", method)
    second = merge(cut[1:], cut[0], tmp_path / "b", method)
    third = merge(cut[1:], cut[0], tmp_path / "c", method, shard_size="3kB")
    assert first.report.weights_digest == second.report.weights_digest == third.report.weights_digest
    assert (first.path / "model.safetensors").read_bytes() == (second.path / "model.safetensors").read_bytes()
    assert len(list(third.path.glob("model-*.safetensors"))) > 2
    assert (third.path / "model.safetensors.index.json").is_file()


@everywhere
def test_same_result_in_small_blocks(
    family: dict[str, Path], tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = merge([family["a"], family["b"]], family["base"], tmp_path / "whole", method)
    monkeypatch.setattr("basiscli.commands.merge.plan.BLOCK_ELEMENTS", 50)
    blocks = merge([family["a"], family["b"]], family["base"], tmp_path / "blocks", method)
    for name, tensor in read_checkpoint(whole.path).items():
        torch.testing.assert_close(read_checkpoint(blocks.path)[name], tensor, rtol=1e-5, atol=1e-6)


@everywhere
def test_a_misspelt_parameter_is_refused(family: dict[str, Path], tmp_path: Path, method: str) -> None:
    with pytest.raises(basiscli.UsageError, match="no parameter 'densty'"):
        merge([family["a"], family["b"]], family["base"], tmp_path / "out", method, parameters={"densty": 0.5})


@everywhere
def test_every_method_is_documented(method: str) -> None:
    found = Registry().find("merge", method)
    assert found.summary.endswith(".")
    assert found.source
    pages = Path(__file__).parents[2] / "docs" / "methods"
    page = pages / f"{SHARED_PAGES.get(method, method)}.md"
    assert page.is_file()
    assert f"--method {method}" in page.read_text()
    assert all(f"`{name}`" in page.read_text() for name in found.parameters.model_fields)


def test_linear_is_the_weighted_average(family: dict[str, Path], tmp_path: Path) -> None:
    result = basiscli.merge([family[n] for n in "abc"], method="linear", weights=[1, 2, 5], output=tmp_path / "out")
    models = [read_checkpoint(family[n]) for n in "abc"]
    for name, tensor in read_checkpoint(result.path).items():
        a, b, c = (model[name].double() for model in models)
        torch.testing.assert_close(tensor.double(), (a + 2 * b + 5 * c) / 8, rtol=1e-6, atol=1e-6)


def test_task_arithmetic_adds_task_vectors(family: dict[str, Path], tmp_path: Path) -> None:
    result = merge(
        [family["a"], family["b"]], family["base"], tmp_path / "out", "task_arithmetic",
        parameters={"lambda": 0.4}, weights=[1, -2],
    )  # fmt: skip
    base, a, b = (read_checkpoint(family[n]) for n in ("base", "a", "b"))
    for name, tensor in read_checkpoint(result.path).items():
        x, y, z = base[name].double(), a[name].double(), b[name].double()
        torch.testing.assert_close(tensor.double(), x + 0.4 * ((y - x) - 2 * (z - x)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "parameters"), [("linear", {}), ("linear", {"normalize": False}), ("task_arithmetic", {"lambda": 0.3})]
)
def test_onto_continues_methods_with_weights(
    family: dict[str, Path], tmp_path: Path, method: str, parameters: dict[str, Any]
) -> None:
    options: dict[str, Any] = {"parameters": parameters}
    a, b, c = (family[n] for n in "abc")
    at_once = merge([a, b, c], family["base"], tmp_path / "abc", method, weights=[1, 2, 3], **options)
    two = merge([a, b], family["base"], tmp_path / "ab", method, weights=[1, 2], **options)
    three = merge([c], family["base"], tmp_path / "ab+c", method, weights=[3], onto=two.path, **options)
    for name, tensor in read_checkpoint(at_once.path).items():
        torch.testing.assert_close(read_checkpoint(three.path)[name], tensor, rtol=1e-5, atol=1e-6)
