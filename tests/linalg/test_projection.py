"""The projection step against a direct dense computation in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from basiscli.linalg import lowrank, projection
from basiscli.linalg.lowrank import LowRank, gram, inner
from basiscli.linalg.projection import leading_count, project_and_add
from tests.plugins.reference_ortho import clean


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def low_rank(seed: int, m: int, n: int, k: int) -> LowRank:
    return LowRank(normal(seed, m, k), normal(seed + 1, k, n), (m, n))


def dense(x: Tensor | LowRank) -> Tensor:
    return x.b.double() @ x.a.double() if isinstance(x, LowRank) else x.double()


def error(found: Tensor | LowRank, merged: Tensor | LowRank, update: Tensor | LowRank, alpha: float) -> float:
    expected = dense(merged) + clean(dense(merged), dense(update), alpha)
    return float((dense(found) - expected).norm() / expected.norm())


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("shape", [(64, 64), (200, 48), (48, 200), (1, 30), (30, 1)])
def test_dense_matrices(shape: tuple[int, int], alpha: float) -> None:
    merged, update = normal(1, *shape), normal(2, *shape)
    assert error(project_and_add(merged, update, alpha)[0], merged, update, alpha) < 2e-6


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_factors_stay_factors(alpha: float) -> None:
    merged, update = low_rank(1, 60, 90, 5), low_rank(3, 60, 90, 4)
    found, _ = project_and_add(merged, update, alpha)
    assert isinstance(found, LowRank)
    assert found.rank == 9
    assert error(found, merged, update, alpha) < 2e-6


def test_a_dense_low_rank_matrix_has_no_directions_in_its_noise() -> None:
    # The paper's code takes rounding noise for directions and removes a tenth of the update along them.
    exact, update = low_rank(1, 120, 120, 4), normal(5, 120, 120)
    assert error(project_and_add(exact.dense(), update, 0.5)[0], exact, update, 0.5) < 2e-6


def test_small_singular_values_are_resolved() -> None:
    u, v = (torch.linalg.qr(normal(seed, 80, 80).double())[0] for seed in (1, 2))
    merged = (u @ torch.diag(torch.logspace(0, -5, 80, dtype=torch.float64)) @ v.mT).float()
    update = normal(3, 80, 80)
    assert error(project_and_add(merged, update, 0.5)[0], merged, update, 0.5) < 1e-5


def test_large_matrices_go_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    merged, update = normal(1, 300, 20), normal(2, 300, 20)
    whole = project_and_add(merged, update, 0.5)[0]
    monkeypatch.setattr(projection, "_BLOCK_ELEMENTS", 20 * 7)
    monkeypatch.setattr(projection, "_KEEP_ELEMENTS", 0)
    torch.testing.assert_close(project_and_add(merged, update, 0.5)[0], whole)


def test_nothing_is_removed_where_nothing_is_merged_yet() -> None:
    update = normal(1, 10, 8)
    found, r = project_and_add(torch.zeros(10, 8), update, 0.5)
    assert torch.equal(found, update)
    assert r == 0


def test_inputs_are_left_alone() -> None:
    merged, update = normal(1, 30, 20), normal(2, 30, 20)
    before = merged.clone(), update.clone()
    project_and_add(merged, update, 0.5)
    assert torch.equal(merged, before[0])
    assert torch.equal(update, before[1])


@pytest.mark.parametrize(("alpha", "r"), [(0.0, 0), (0.39, 0), (0.4, 1), (0.65, 1), (0.7, 2), (0.95, 3), (1.0, 4)])
def test_r_counts_the_triplets_before_the_share_is_exceeded(alpha: float, r: int) -> None:
    assert leading_count(torch.tensor([4.0, 3.0, 2.0, 1.0]), alpha) == r


def test_inner_products_in_factors_and_dense_agree() -> None:
    x, y = low_rank(1, 40, 30, 3), low_rank(7, 40, 30, 6)
    expected = float((dense(x) * dense(y)).sum())
    assert inner(x, y) == pytest.approx(expected, rel=1e-5)
    assert inner(x.dense(), y) == pytest.approx(expected, rel=1e-5)


def test_gram_matrix_is_as_good_as_float64() -> None:
    vectors = [normal(seed, 200_003) for seed in range(3)]
    stacked = torch.stack(vectors).double()
    torch.testing.assert_close(gram(vectors), stacked @ stacked.mT, rtol=1e-6, atol=1e-2)


def test_blocks_are_multiplied_together_as_a_gpu_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, origin = [normal(seed, 10_007) for seed in range(3)], normal(9, 10_007)
    one_at_a_time = gram(vectors, 100, origin=origin)
    monkeypatch.setattr(lowrank, "_BLOCKS_TOGETHER", {"cpu": 64})
    torch.testing.assert_close(gram(vectors, 100, origin=origin), one_at_a_time, rtol=1e-6, atol=1e-3)
    moved = torch.stack(vectors).double() - origin.double()
    torch.testing.assert_close(one_at_a_time, moved @ moved.mT, rtol=1e-6, atol=1e-2)


def test_low_rank_svd_reproduces_the_matrix() -> None:
    x = low_rank(1, 50, 70, 6)
    u, sigma, vh = x.svd()
    assert sigma.numel() == 6
    assert bool((sigma[:-1] >= sigma[1:]).all())
    torch.testing.assert_close(u @ torch.diag(sigma) @ vh, dense(x))


def test_sums_with_dense_tensors_are_dense() -> None:
    x, y = low_rank(1, 5, 4, 2), normal(3, 5, 4)
    torch.testing.assert_close(x + y, x.dense() + y)
    torch.testing.assert_close(y + x, y + x.dense())
