"""Singular vectors against LAPACK's in float64: products and subspaces, since vectors have no sign."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import basiscli.linalg.svd as module
from basiscli.linalg.svd import SVD, TOLERANCE, exact_svd, fast_svd, subspace_residual

WIDE, TALL, SQUARE = (200, 320), (320, 200), (240, 240)
shapes = pytest.mark.parametrize("shape", [WIDE, TALL, SQUARE], ids=str)
Parts = tuple[Tensor, Tensor, Tensor]


def matrix(shape: tuple[int, int], values: Tensor, seed: int = 0) -> Tensor:
    """Return a float32 matrix with given singular values; those that are not given are zero."""
    generator = torch.Generator().manual_seed(seed)

    def orthonormal(rows: int) -> Tensor:
        return torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64))[0]

    return ((orthonormal(shape[0]) * values.double()) @ orthonormal(shape[1]).mT).float()


def gaussian(shape: tuple[int, int], seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SPECTRA = {
    "flat": lambda k: torch.linspace(1, 0.8, k),
    "decaying fast": lambda k: torch.exp(-torch.arange(k) / 10.0),
    "decaying slowly": lambda k: 1 / torch.arange(1, k + 1) ** 0.5,
    "repeated": lambda k: torch.cat([torch.full((4,), 3.0), torch.linspace(1, 0.5, k - 4)]),
    "all equal": lambda k: torch.ones(k),
    "rank 1": lambda k: torch.tensor([2.0]),
    "rank 3": lambda k: torch.tensor([3.0, 2.0, 1.0]),
    "rank 12": lambda k: torch.linspace(2, 1, 12),
    "zero": lambda k: torch.zeros(1),
}
spectra = pytest.mark.parametrize("spectrum", SPECTRA)


def product(parts: Parts) -> Tensor:
    u, s, vh = (part.double() for part in parts)
    return (u * s) @ vh


def reference(weight: Tensor, rank: int, *, largest: bool = True) -> Parts:
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    some = slice(0, rank) if largest else slice(len(s) - rank, len(s))
    return u[:, some], s[some], vh[some]


def check_form(weight: Tensor, rank: int, parts: Parts) -> None:
    u, s, vh = parts
    assert (u.shape, s.shape, vh.shape) == ((len(weight), rank), (rank,), (rank, weight.shape[1]))
    assert {part.dtype for part in parts} == {torch.float32}
    assert all(bool(torch.isfinite(part).all()) for part in parts)
    assert bool((s >= 0).all())


def check_orthonormal(parts: Parts, above: float = 1e-4) -> None:
    """Check the vectors of every singular value that is not rounding."""
    u, s, vh = parts
    count = int((s > above * s.max()).sum())
    for vectors in (u[:, :count], vh[:count].mT):
        torch.testing.assert_close(vectors.mT @ vectors, torch.eye(count), rtol=0, atol=1e-4)


def check_best(weight: Tensor, rank: int, parts: Parts, excess: float) -> None:
    """Check that no matrix of the rank is nearer, but for so much of the weight's norm.

    Where singular values are equal the best approximation is not unique: its distance is.
    """
    unavoidable = (weight - product(reference(weight, rank))).norm()
    assert (weight - product(parts)).norm() <= unavoidable + excess * weight.double().norm()


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Yield a list of the ranks of exact decompositions."""
    calls: list[int] = []

    def exact(weight: Tensor, rank: int, *, largest: bool = True) -> Parts:
        calls.append(rank)
        return exact_svd(weight, rank, largest=largest)

    with monkeypatch.context() as patch:
        patch.setattr(module, "exact_svd", exact)
        yield calls


# Exact ----------------------------------------------------------------------------------------------------------------


@shapes
@spectra
@pytest.mark.parametrize("rank", [1, 8])
def test_exact_is_the_truncated_svd(shape: tuple[int, int], spectrum: str, rank: int) -> None:
    weight = matrix(shape, SPECTRA[spectrum](min(shape)))
    parts = exact_svd(weight, rank)
    check_form(weight, rank, parts)
    check_orthonormal(parts)
    check_best(weight, rank, parts, 1e-6)
    values = reference(weight, rank)[1]
    assert bool((parts[1][:-1] >= parts[1][1:] - 1e-6).all())
    torch.testing.assert_close(parts[1].double(), values, rtol=1e-5, atol=1e-6 * float(values[0]))


@shapes
@pytest.mark.parametrize("spectrum", ["decaying fast", "decaying slowly", "rank 3"])
def test_exact_gives_the_product_itself_where_it_is_unique(shape: tuple[int, int], spectrum: str) -> None:
    weight = matrix(shape, SPECTRA[spectrum](min(shape)))
    distance = (product(exact_svd(weight, 8)) - product(reference(weight, 8))).norm()
    assert distance <= 1e-5 * weight.double().norm()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (24, 24), (1, 30), (30, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("decompose", ["exact", "fast", "bottom"])
def test_the_whole_rank_is_the_whole_matrix(shape: tuple[int, int], decompose: str) -> None:
    weight, rank = gaussian(shape), min(shape)
    space = SVD(exact=decompose == "exact", seed=0)
    parts = space.bottom(weight, rank) if decompose == "bottom" else space.top(weight, rank)
    check_form(weight, rank, parts)
    check_orthonormal(parts, above=1e-6)
    torch.testing.assert_close(product(parts), weight.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(60, 100), (100, 60), (80, 80)], ids=str)
@pytest.mark.parametrize("rank", [1, 5])
def test_the_smallest_singular_values(shape: tuple[int, int], rank: int) -> None:
    weight = gaussian(shape)
    parts = SVD(exact=False, seed=0).bottom(weight, rank)
    expected = reference(weight, rank, largest=False)
    check_form(weight, rank, parts)
    check_orthonormal(parts)
    torch.testing.assert_close(parts[1].double(), expected[1], rtol=1e-4, atol=1e-6)
    assert (product(parts) - product(expected)).norm() <= 1e-5 * expected[1].norm()
    assert bool((parts[1][:-1] >= parts[1][1:]).all())


@shapes
def test_the_smallest_singular_values_of_a_deficient_matrix_are_nothing(shape: tuple[int, int]) -> None:
    weight = matrix(shape, SPECTRA["rank 12"](0))
    parts = SVD(exact=True, seed=0).bottom(weight, 8)
    check_form(weight, 8, parts)
    assert product(parts).norm() <= 1e-6 * weight.norm()


# Fast -----------------------------------------------------------------------------------------------------------------


@shapes
@spectra
@pytest.mark.parametrize("rank", [1, 8])
def test_fast_is_right_to_its_tolerance(shape: tuple[int, int], spectrum: str, rank: int) -> None:
    weight = matrix(shape, SPECTRA[spectrum](min(shape)))
    parts = fast_svd(weight, rank, seed=0)
    check_form(weight, rank, parts)
    check_orthonormal(parts)
    assert subspace_residual(weight, *parts) <= TOLERANCE
    check_best(weight, rank, parts, 1e-4)
    torch.testing.assert_close(parts[1].double(), reference(weight, rank)[1], rtol=2e-3, atol=1e-6)


@shapes
@pytest.mark.parametrize("spectrum", ["decaying fast", "decaying slowly", "repeated", "rank 3"])
def test_fast_gives_the_product_to_two_percent(shape: tuple[int, int], spectrum: str) -> None:
    weight, rank = matrix(shape, SPECTRA[spectrum](min(shape))), 4
    expected = product(reference(weight, rank))
    assert (product(fast_svd(weight, rank, seed=0)) - expected).norm() <= 0.02 * expected.norm()


@shapes
def test_fast_finds_the_subspace_of_repeated_values(shape: tuple[int, int]) -> None:
    weight = matrix(shape, SPECTRA["repeated"](min(shape)))
    found, expected = fast_svd(weight, 4, seed=0), reference(weight, 4)
    for x, y in ((found[0], expected[0]), (found[2].mT, expected[2].mT)):
        assert (x.double() @ x.mT.double() - y @ y.mT).norm() < 1e-2


def test_fast_takes_the_quick_way_where_it_converges(monkeypatch: pytest.MonkeyPatch) -> None:
    with counted(monkeypatch) as calls:
        for spectrum in ("decaying fast", "rank 3", "rank 12", "zero"):
            fast_svd(matrix((400, 500), SPECTRA[spectrum](400)), 8, seed=0)
        assert not calls
        fast_svd(matrix((200, 300), SPECTRA["flat"](200)), 8, seed=0)  # half of its columns are not enough
        assert set(calls) == {8}
        fast_svd(gaussian((200, 300)), 40, seed=0)  # too many are wanted for the quick way to pay
        assert set(calls) == {8, 40}


def test_the_residual_measures_how_far_off_vectors_are() -> None:
    weight = matrix((60, 80), SPECTRA["decaying slowly"](60))
    u, s, vh = exact_svd(weight, 4)
    assert subspace_residual(weight, u, s, vh) < 1e-6
    assert subspace_residual(weight, u, s, vh.roll(1, 0)) > 0.1
    assert subspace_residual(weight, u, 1.1 * s, vh) > 0.01
    turned = torch.linalg.qr(u + 0.01 * gaussian(tuple(u.shape)))[0]
    assert subspace_residual(weight, turned, s, vh) > TOLERANCE


@shapes
@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("exact", [True, False])
def test_the_scale_of_the_matrix_does_not_matter(shape: tuple[int, int], scale: float, exact: bool) -> None:
    weight = matrix(shape, SPECTRA["decaying fast"](min(shape)))
    space = SVD(exact, seed=0)
    large, plain = product(space.top(weight * scale, 8)), product(space.top(weight, 8))
    assert (large / scale - plain).norm() <= 1e-4 * plain.norm()


@shapes
@pytest.mark.parametrize("exact", [True, False])
def test_the_same_bits_for_a_seed(shape: tuple[int, int], exact: bool) -> None:
    weight = matrix(shape, SPECTRA["decaying fast"](min(shape)))
    first, second = SVD(exact, seed=3).top(weight, 8), SVD(exact, seed=3).top(weight, 8)
    torch.manual_seed(1234)  # the global generator is nobody's business
    third = SVD(exact, seed=3).top(weight, 8)
    assert all(torch.equal(x, y) and torch.equal(x, z) for x, y, z in zip(first, second, third, strict=True))
    other = SVD(exact, seed=4).top(weight, 8)
    assert exact == all(torch.equal(x, y) for x, y in zip(first, other, strict=True))


@pytest.mark.parametrize("exact", [True, False])
def test_threads_change_nothing_but_rounding(exact: bool) -> None:
    weight = matrix(WIDE, SPECTRA["decaying slowly"](WIDE[0]))
    before, products = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            products.append(product(SVD(exact, seed=0).top(weight, 8)))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(products[0], products[1], rtol=0, atol=1e-5 * float(products[0].abs().max()))


def test_the_input_is_left_alone() -> None:
    weight = gaussian(WIDE)
    before = weight.clone()
    for exact in (True, False):
        SVD(exact, seed=0).top(weight, 8)
    SVD(exact=True, seed=0).bottom(weight, 8)
    assert torch.equal(weight, before)
