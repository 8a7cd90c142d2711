"""The methods people know from mergekit, against dense float64 computations and by what must hold of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import basiscli
from basiscli.linalg.random_mask import bernoulli, words
from basiscli.linalg.selection import largest
from basiscli.linalg.sparsify import row_ranks
from tests.conftest import add, make_tensors, read_checkpoint, write_checkpoint
from tests.plugins import reference_merges as reference

Family = dict[str, Path]
Formula = Callable[[np.ndarray, list[np.ndarray]], np.ndarray]
W = [1.0, 0.5, 2.0]


def merge(models: list[Path], base: Path | None, out: Path, method: str, **options: Any) -> basiscli.MergeResult:
    return basiscli.merge(models, method=method, base=base, output=out, **options)


def deltas(base: np.ndarray, models: list[np.ndarray]) -> list[np.ndarray]:
    # In float32, as they are trimmed: float64 would tell apart what float32 does not.
    return [(m.astype(np.float32) - base.astype(np.float32)).astype(np.float64) for m in models]


def sparsified(
    keep: Callable[[np.ndarray, int], np.ndarray],
    add_up: Callable[[list[np.ndarray], list[float], bool], np.ndarray],
    *,
    normalize: bool,
    rescale: bool = False,
    scale: float = 1.0,
) -> Formula:
    def formula(base: np.ndarray, models: list[np.ndarray]) -> np.ndarray:
        thin = []
        for place, delta in enumerate(deltas(base, models)):
            kept = keep(delta, place)
            thin.append(reference.to_old_length(delta, kept) if rescale else kept)
        return np.asarray(base + scale * add_up(thin, W, normalize))

    return formula


TIES, SUM = reference.consensus, reference.plain_sum
trimmed = [0.2, 0.5, 1.0]
CASES: list[tuple[str, dict[str, Any], int, Formula]] = [
    ("ties", {"density": 0.3}, 3, sparsified(lambda d, _: reference.trim(d, 0.3), TIES, normalize=True)),
    (
        "ties", {"density": trimmed, "normalize": False, "lambda": 0.7, "rescale": True}, 3,
        sparsified(lambda d, i: reference.trim(d, trimmed[i]), TIES, normalize=False, rescale=True, scale=0.7),
    ),
    ("ties", {"density": 0.0}, 3, lambda base, models: base),
    (
        "breadcrumbs", {"density": [0.4, 0.9, 0.95], "gamma": [0.2, 0.05, 0.3]}, 3,
        sparsified(
            lambda d, i: reference.breadcrumb(d, [0.4, 0.9, 0.95][i], [0.2, 0.05, 0.3][i]), SUM, normalize=False
        ),
    ),
    (
        "breadcrumbs_ties", {"density": 0.5, "gamma": 0.1, "rescale": True}, 3,
        sparsified(lambda d, _: reference.breadcrumb(d, 0.5, 0.1), TIES, normalize=False, rescale=True),
    ),
    ("dare_ties", {}, 3, sparsified(lambda d, _: d, TIES, normalize=False)),
    ("dare_linear", {"normalize": True}, 3, sparsified(lambda d, _: d, SUM, normalize=True)),
    ("della", {}, 3, sparsified(lambda d, _: d, TIES, normalize=True)),
    ("sce", {}, 3, lambda base, models: base + reference.sce(deltas(base, models), 1.0)),
    ("sce", {"select_topk": 0.4}, 3, lambda base, models: base + reference.sce(deltas(base, models), 0.4)),
    ("slerp", {"t": 0.3}, 2, lambda _, m: reference.arc(m[0].ravel(), m[1].ravel(), 0.3, 0.9995).reshape(m[0].shape)),
    (
        "nuslerp", {}, 2,
        lambda b, m: b + reference.arc(*(d.ravel() for d in deltas(b, m)), 1 / 3, 1 - 1e-6).reshape(b.shape),
    ),
    (
        "nuslerp", {"nuslerp_flatten": False}, 2,
        lambda b, m: b + reference.arcs(*deltas(b, m), 1 / 3, -1).reshape(b.shape),
    ),
    (
        "nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}, 2,
        lambda b, m: b + reference.arcs(*deltas(b, m), 1 / 3, 0).reshape(b.shape),
    ),
    ("multislerp", {}, 3, lambda base, models: base + reference.multislerp(deltas(base, models), W)),
    ("karcher", {"max_iter": 100, "tol": 1e-9}, 3, lambda _, models: reference.karcher(models)),
    ("model_stock", {}, 3, lambda base, models: reference.stock(base, models, filter_wise=False)),
    ("model_stock", {"filter_wise": True}, 3, lambda base, models: reference.stock(base, models, filter_wise=True)),
    ("nearswap", {"t": 0.02}, 2, lambda _, m: m[0] + np.clip(m[1] - m[0], -0.02, 0.02)),
    ("arcee_fusion", {}, 2, lambda _, m: reference.fusion(*m)),
    ("passthrough", {"scale": -0.5}, 1, lambda _, m: -0.5 * m[0]),
]  # fmt: skip


def name_of(case: object) -> str:
    return case.__name__ if isinstance(case, FunctionType) else str(case)[:40]


@pytest.mark.parametrize("blocks", ["one block", "blocks of rows"])
@pytest.mark.parametrize(("method", "parameters", "count", "formula"), CASES, ids=name_of)
def test_it_is_the_dense_computation(
    tmp_path: Path, method: str, parameters: dict[str, Any], count: int, formula: Formula, blocks: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    base = make_tensors(0)
    # Of different lengths, so that no symmetry hides a mistake.
    models = [add(base, make_tensors(seed), factor=0.2 * seed) for seed in range(1, count + 1)]
    folders = [write_checkpoint(tmp_path / f"{i}", t) for i, t in enumerate([base, *models])]
    if blocks == "blocks of rows":
        monkeypatch.setattr("basiscli.commands.merge.plan.BLOCK_ELEMENTS", 60)
        monkeypatch.setattr("basiscli.commands.merge.reader.KEPT_BYTES", 3000)  # the larger ones are read again
    takes_weights = any(name == method for name in ("ties", "nuslerp", "multislerp")) or method.startswith(
        ("dare", "della", "breadcrumbs")
    )
    weights = ([1.0, 0.5] if method == "nuslerp" else W) if takes_weights else None
    result = merge(folders[1:], folders[0], tmp_path / "out", method, parameters=parameters, weights=weights)
    merged = read_checkpoint(result.path)
    for name, tensor in base.items():
        whole = [t[name].double().numpy() for t in models]
        expected = formula(tensor.double().numpy(), whole)
        scale = float(np.abs(expected).max()) if expected.size else 1.0
        np.testing.assert_allclose(merged[name].double().numpy(), expected, rtol=2e-6, atol=2e-6 * scale, err_msg=name)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("linear", {}),
        ("karcher", {}),
        ("multislerp", {}),
        ("slerp", {"t": 0.25}),
        ("nuslerp", {}),
        ("nearswap", {"t": 0.5}),
        ("arcee_fusion", {}),
        ("ties", {}),
        ("sce", {}),
        ("model_stock", {}),
    ],
)
def test_copies_of_one_model_give_that_model(tmp_path: Path, method: str, parameters: dict[str, Any]) -> None:
    model = make_tensors(1)
    copies = [write_checkpoint(tmp_path / name, model) for name in "ab"]
    base = write_checkpoint(tmp_path / "base", make_tensors(0))
    needs_base = method in {"ties", "sce", "model_stock"}
    merged = read_checkpoint(
        merge(copies, base if needs_base else None, tmp_path / "out", method, parameters=parameters).path
    )
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, model[name], rtol=1e-6, atol=1e-6)


def test_the_ends_of_an_interpolation_are_the_models(family: Family, tmp_path: Path) -> None:
    a, b = (read_checkpoint(family[n]) for n in "ab")
    for t, end in ((0, a), (1, b)):
        out = merge([family["a"], family["b"]], None, tmp_path / f"slerp{t}", "slerp", parameters={"t": t}).path
        for name, tensor in read_checkpoint(out).items():
            torch.testing.assert_close(tensor, end[name], rtol=1e-6, atol=1e-7)


def test_interpolating_two_models_needs_no_base(family: Family, tmp_path: Path, basis: Callable[..., Any]) -> None:
    result = basis("merge", family["a"], family["b"], "--method", "slerp", "-p", "t=0.5", "-o", tmp_path / "out", "-q")
    assert result.exit_code == 0, result.output


# Random masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_a_merge_with_random_masks_is_reproducible_and_says_its_seed(
    family: Family, tmp_path: Path, method: str
) -> None:
    """Without a seed mergekit's differs from run to run."""
    models, options = [family["a"], family["b"]], {"parameters": {"density": 0.5}}
    digests = [
        merge(models, family["base"], tmp_path / f"{i}", method, workers=i + 1, **options).report.weights_digest
        for i in range(3)
    ]
    other = merge(models, family["base"], tmp_path / "other", method, seed=1, **options)
    assert len(set(digests)) == 1
    assert other.report.weights_digest != digests[0]
    assert other.report.seed == 1
    assert json.loads((tmp_path / "0" / "basis_report.json").read_text())["seed"] == 0


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_what_is_dropped_does_not_depend_on_other_tensors(tmp_path: Path, method: str) -> None:
    base = make_tensors(0)
    model = add(base, make_tensors(1))
    some = [name for name in base if "layers" in name]
    out = []
    for label, names in (("all", list(base)), ("some", some)):
        folders = [
            write_checkpoint(tmp_path / label / str(i), {n: t[n] for n in names}) for i, t in enumerate([base, model])
        ]
        result = merge(folders[1:], folders[0], tmp_path / label / "out", method, parameters={"density": 0.5})
        out.append(read_checkpoint(result.path))
    assert all(torch.equal(out[0][name], out[1][name]) for name in some)


def big_family(tmp_path: Path) -> tuple[Path, Path, Tensor]:
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(300, 1000, generator=generator)
    base = write_checkpoint(tmp_path / "base", {"x.weight": torch.zeros(300, 1000)})
    return base, write_checkpoint(tmp_path / "a", {"x.weight": delta}), delta


def test_dare_keeps_a_share_and_its_expectation(tmp_path: Path) -> None:
    base, model, delta = big_family(tmp_path)
    result = merge([model], base, tmp_path / "out", "dare_linear", parameters={"density": 0.3})
    merged = read_checkpoint(result.path)["x.weight"]
    kept = merged != 0
    torch.testing.assert_close(merged[kept], delta[kept] / 0.3)
    assert float(kept.float().mean()) == pytest.approx(0.3, abs=4 * (0.21 / delta.numel()) ** 0.5)
    # Rows and columns have no pattern.
    for side in (0, 1):
        spread = float(kept.float().mean(dim=side).std())
        assert spread == pytest.approx((0.21 / kept.shape[side]) ** 0.5, rel=0.15)


def test_two_models_do_not_lose_the_same_elements(tmp_path: Path) -> None:
    base, model, _ = big_family(tmp_path)
    twice = merge([model, model], base, tmp_path / "out", "dare_linear", parameters={"density": 0.5})
    merged = read_checkpoint(twice.path)["x.weight"]
    assert float((merged == 0).float().mean()) == pytest.approx(0.25, abs=0.01)


def test_della_keeps_the_large_rather_and_gives_the_length_back(tmp_path: Path) -> None:
    base, model, delta = big_family(tmp_path)
    parameters = {"density": 0.4, "epsilon": 0.3}
    result = merge([model], base, tmp_path / "out", "della_linear", parameters=parameters)
    merged = read_checkpoint(result.path)["x.weight"]
    assert float(merged.abs().double().sum()) == pytest.approx(float(delta.abs().double().sum()), rel=1e-5)
    rank = delta.abs().argsort(dim=1).argsort(dim=1).double() / 999
    for low in (0.0, 0.25, 0.5, 0.75):
        inside = (rank >= low) & (rank < low + 0.25)
        kept = float((merged[inside] != 0).double().mean())
        assert kept == pytest.approx(0.1 + 0.6 * (low + 0.125), abs=0.01)


# Continuing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dare_linear", "della_linear", "breadcrumbs"])
def test_onto_continues_sums(family: Family, tmp_path: Path, method: str) -> None:
    parameters: dict[str, Any] = {"density": 0.6, "lambda": 0.5}
    lists = parameters | {"density": [0.6, 0.7, 0.6]}
    a, b, c = (family[n] for n in "abc")
    at_once = merge([a, b, c], family["base"], tmp_path / "abc", method, weights=[1, 2, 3], parameters=lists)
    first = merge([a], family["base"], tmp_path / "a1", method, weights=[1], parameters=parameters)
    second = merge(
        [b], family["base"], tmp_path / "ab", method, weights=[2], parameters=parameters | {"density": [0.7]},
        onto=first.path,
    )  # fmt: skip
    third = merge([c], family["base"], tmp_path / "ab+c", method, weights=[3], parameters=parameters, onto=second.path)
    assert third.report.numbers["models"] == 3
    for name, tensor in read_checkpoint(at_once.path).items():
        torch.testing.assert_close(read_checkpoint(third.path)[name], tensor, rtol=1e-5, atol=1e-6)


def test_onto_is_refused_where_it_would_not_be_the_same(family: Family, tmp_path: Path) -> None:
    mean = merge(
        [family["a"]], family["base"], tmp_path / "a1", "dare_linear", parameters={"normalize": True, "density": 0.5}
    )
    with pytest.raises(basiscli.UsageError, match="normalize=true cannot be continued"):
        merge([family["b"]], family["base"], tmp_path / "b1", "dare_linear", onto=mean.path)
    for method, parameters in (("ties", {}), ("karcher", {}), ("slerp", {"t": 0.5}), ("model_stock", {})):
        with pytest.raises(basiscli.UsageError, match=r"cannot be continued with --onto|models"):
            merge([family["b"]], family["base"], tmp_path / "c1", method, onto=mean.path, parameters=parameters)


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "words", "message"),
    [
        ("ties", ["-p", "densty=0.5"], "ties has no parameter 'densty'"),
        ("ties", ["-p", "density=1.5"], "parameter density=1.5 of ties"),
        ("ties", ["-p", "density=-0.1"], "parameter density=-0.1 of ties"),
        ("ties", ["-p", "density=[0.5,2]"], "parameter density.1=2 of ties"),
        ("ties", ["-p", "density=[0.5,0.5,0.5]"], "parameter density of ties: 3 numbers for 2 models"),
        ("ties", ["-p", "density=[]"], "parameter density of ties: 0 numbers for 2 models"),
        ("ties", ["-p", "density=much"], "parameter density='much' of ties"),
        ("ties", ["-p", "lambda=NaN"], "parameter lambda=nan of ties"),
        ("breadcrumbs", ["-p", "gamma=[0.1]"], "parameter gamma of breadcrumbs: 1 numbers for 2 models"),
        ("della", ["-p", "density=0.9"], "0.9 ∓ 0.15, must lie between 0 and 1"),
        ("della_linear", ["-p", "density=[0.5,0.1]"], "0.1 ∓ 0.15, must lie between 0 and 1"),
        ("della", ["-p", "epsilon=0.5"], "parameter epsilon=0.5 of della"),
        ("sce", ["-p", "select_topk=0"], "parameter select_topk=0 of sce"),
        ("sce", ["--weights", "1,2"], "sce takes no weights"),
        ("slerp", [], "parameter t="),
        ("slerp", ["-p", "t=1.01"], "parameter t=1.01 of slerp"),
        ("nearswap", ["-p", "t=-1"], "parameter t=-1 of nearswap"),
        ("nuslerp", ["--weights", "1,-1"], "nuslerp divides by the sum of the weights"),
        ("multislerp", ["--weights", "1,-1"], "the weights sum to zero"),
        ("multislerp", ["-p", "eps=0"], "parameter eps=0 of multislerp"),
        ("karcher", ["-p", "max_iter=-1"], "parameter max_iter=-1 of karcher"),
        ("karcher", ["-p", "tol=0"], "parameter tol=0 of karcher"),
        ("passthrough", [], "passthrough merges 1 model, and 2 are given"),
        ("arcee_fusion", ["c"], "arcee_fusion merges 2 models, and 3 are given"),
        ("slerp", ["c", "-p", "t=0.5"], "slerp merges 2 models, and 3 are given"),
        ("nuslerp", ["c"], "nuslerp merges 2 models, and 3 are given"),
        ("nearswap", ["c", "-p", "t=0.5"], "nearswap merges 2 models, and 3 are given"),
    ],
)
def test_what_makes_no_sense_is_refused_in_the_plan(
    family: Family, tmp_path: Path, basis: Callable[..., Any], method: str, words: list[str], message: str
) -> None:
    out = tmp_path / "out"
    given = [family.get(word, word) for word in words]
    result = basis("merge", family["a"], family["b"], "--base", family["base"], "-m", method, "-o", out, *given)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not list(tmp_path.glob("out*"))


def test_too_few_models_are_refused(family: Family, tmp_path: Path) -> None:
    for method, wanted in (("model_stock", "2 or more models beside the base"), ("arcee_fusion", "2 models")):
        with pytest.raises(basiscli.UsageError, match=f"{method} merges {wanted}, and 1 are given"):
            merge([family["a"]], family["base"], tmp_path / "out", method)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "della", "sce", "karcher", "arcee_fusion"])
def test_a_nan_is_refused_by_name(family: Family, tmp_path: Path, method: str) -> None:
    """mergekit lets it through."""
    tensors = read_checkpoint(family["b"])
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = float("nan")
    bad = write_checkpoint(tmp_path / "bad", tensors)
    with pytest.raises(basiscli.InputError, match="NaN or Inf") as caught:
        merge([family["a"], bad], family["base"], tmp_path / "out", method)
    assert caught.value.tensor == "model.layers.0.mlp.up_proj.weight"
    assert not (tmp_path / "out").exists()


def test_ties_of_bfloat16_models_is_as_good_as_float32(tmp_path: Path) -> None:
    """mergekit's arithmetic in bfloat16 is 5.6 % off; one rounding of the result is at most 2⁻⁹ off."""
    base = make_tensors(0, torch.bfloat16)
    models = [add(base, make_tensors(seed)) for seed in (1, 2, 3)]
    folders = [write_checkpoint(tmp_path / f"{i}", t) for i, t in enumerate([base, *models])]
    merged = read_checkpoint(merge(folders[1:], folders[0], tmp_path / "o", "ties", parameters={"density": 0.5}).path)
    for name, tensor in merged.items():
        before, after = base[name].double().numpy(), [model[name].double().numpy() for model in models]
        thin = [reference.trim(delta, 0.5) for delta in deltas(before, after)]
        expected = before + reference.consensus(thin, [1.0] * 3, normalize=True)
        np.testing.assert_allclose(tensor.double().numpy(), expected, rtol=2**-8, err_msg=name)


# The parts ------------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.one_of(st.floats(0, 2.0**99, width=32), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=60),
    st.data(),
)
@settings(max_examples=150, deadline=None)
def test_selection_is_exact_with_equal_elements_and_any_blocks(numbers: list[float], data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    values = torch.tensor(numbers, dtype=dtype)
    size = data.draw(st.integers(1, len(numbers)))
    ks = data.draw(st.lists(st.integers(0, len(numbers)), min_size=1, max_size=3))

    def over() -> Iterator[tuple[int, list[Tensor]]]:
        for start in range(0, len(values), size):
            yield start, [values[start : start + size]]

    order = np.lexsort((np.arange(len(values)), -values.numpy()))
    for k, cut in zip(ks, largest(over, [ks])[0], strict=True):
        expected = torch.zeros_like(values)
        chosen = torch.from_numpy(order[:k].copy())
        expected[chosen] = values[chosen]
        kept = torch.cat([cut.keep(block, start) for start, (block,) in over()])
        assert torch.equal(kept, expected)


def test_selection_needs_no_memory_for_the_tensor() -> None:
    """A tensor of 128k × 8k is a billion elements; here blocks made on the spot, and nothing of them is held."""
    passes = 0

    def over() -> Iterator[tuple[int, list[Tensor]]]:
        nonlocal passes
        passes += 1
        for number in range(50):
            generator = torch.Generator().manual_seed(number)
            yield number * 10_000, [torch.rand(10_000, generator=generator)]

    cut = largest(over, [[100_000]])[0][0]
    kept = sum(int(cut.keep(block, start).count_nonzero()) for start, (block,) in over())
    assert kept == 100_000
    assert passes <= 4


def test_random_words_are_the_same_from_any_place() -> None:
    whole = words(7, 2, 0, 100)
    for start in (0, 1, 7, 8, 9, 63):
        assert np.array_equal(words(7, 2, start, 30), whole[start : start + 30])
    assert not np.array_equal(words(7, 3, 0, 100), whole)
    assert len(words(7, 2, 5, 0)) == 0
    # What was merged with a seed comes out again with any version.
    assert whole[:4].tolist() == [14613869, 1574313736, 3944621338, 1717522928]


def test_a_mask_has_the_blocks_dtype_and_shape() -> None:
    mask = bernoulli(torch.zeros(3, 5, dtype=torch.float64), 1.0, 0, 0, 0)
    assert mask.dtype == torch.float64
    assert torch.equal(mask, torch.ones(3, 5, dtype=torch.float64))


def test_ranks_order_equal_magnitudes_by_place() -> None:
    rows = torch.tensor([[0.5, 0.1, 0.5, 0.0], [3.0, 3.0, 3.0, 3.0]])
    assert row_ranks(rows).tolist() == [[2, 1, 3, 0], [0, 1, 2, 3]]
