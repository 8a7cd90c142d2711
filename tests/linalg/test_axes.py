"""Eigenvectors of second moments, and the fewest singular vectors that hold a share, against LAPACK in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from basiscli.linalg.svd import SVD, svd_by_energy
from tests.linalg.test_svd import matrix

SMALL, LARGE = 90, 1100  # decomposed as a whole, and fast
sizes = pytest.mark.parametrize("size", [SMALL, LARGE])
exactness = pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
SPECTRA: dict[str, Callable[[int], Tensor]] = {
    "decaying fast": lambda n: torch.exp(-torch.arange(n) / 4.0),
    "decaying slowly": lambda n: 1 / torch.arange(1, n + 1) ** 1.0,
    "one that stands out": lambda n: torch.cat([torch.tensor([1e5]), 1 / torch.arange(1, n) ** 0.7]),
    "rank 5": lambda n: torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]),
}
spectra = pytest.mark.parametrize("spectrum", SPECTRA)


def moment(size: int, values: Tensor, seed: int = 0) -> Tensor:
    """Return a float64 moment with given eigenvalues; those that are not given are zero."""
    generator = torch.Generator().manual_seed(seed)
    turn: Tensor = torch.linalg.qr(torch.randn(size, len(values), generator=generator, dtype=torch.float64))[0]
    return (turn * values.double()) @ turn.mT


def reference(wanted: Tensor, count: int) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(wanted)
    return vectors[:, -count:].flip(-1).mT, values[-count:].flip(0)


@exactness
@sizes
@spectra
@pytest.mark.parametrize("count", [1, 5])
def test_axes_are_the_leading_eigenvectors(size: int, spectrum: str, exact: bool, count: int) -> None:
    wanted = moment(size, SPECTRA[spectrum](size))
    rows, values = SVD(exact, seed=0).axes(wanted, count)
    expected, squares = reference(wanted, count)
    assert (rows.shape, values.shape, rows.dtype, values.dtype) == ((count, size), (count,), *[torch.float64] * 2)
    # The fast decomposition's tolerance is relative to the largest value, and the others are far below it here.
    sharp = 1e-5 if exact or size == SMALL or spectrum != "one that stands out" else 1e-2
    torch.testing.assert_close(values, squares, rtol=max(sharp**2, 1e-9), atol=1e-14 * float(squares[0]))
    torch.testing.assert_close(rows @ rows.mT, torch.eye(count, dtype=torch.float64), rtol=0, atol=1e-9)
    for row, own in zip(rows, expected, strict=True):
        assert min(float((row - own).norm()), float((row + own).norm())) < sharp
        assert float(row[row.abs().argmax()]) > 0  # so that a sign is nobody's whim


@exactness
@sizes
@pytest.mark.parametrize("rank", [0, 1, 5])
def test_more_axes_than_there_are_directions_are_still_axes(size: int, exact: bool, rank: int) -> None:
    """Inputs that lie in five dimensions: the other rows stand for nothing, and must not repeat the five."""
    wanted = moment(size, torch.linspace(2, 1, rank)) if rank else torch.zeros(size, size, dtype=torch.float64)
    rows, values = SVD(exact, seed=0).axes(wanted, 9)
    assert bool(torch.isfinite(rows).all())
    assert bool((values >= 0).all()) and bool((values[:-1] >= values[1:] - 1e-12).all())
    torch.testing.assert_close(values[rank:], torch.zeros(9 - rank, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(rows @ rows.mT, torch.eye(9, dtype=torch.float64), rtol=0, atol=1e-8)


def test_every_axis_is_the_whole_space() -> None:
    wanted = moment(SMALL, SPECTRA["decaying slowly"](SMALL))
    rows, values = SVD(exact=False, seed=0).axes(wanted, SMALL)
    torch.testing.assert_close(rows.mT @ (values[:, None] * rows), wanted, rtol=0, atol=1e-12)


@exactness
@sizes
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_the_moment_does_not_matter(size: int, exact: bool, scale: float) -> None:
    wanted = moment(size, SPECTRA["decaying fast"](size))
    rows, values = SVD(exact, seed=0).axes(wanted, 4)
    scaled, large = SVD(exact, seed=0).axes(wanted * scale, 4)
    torch.testing.assert_close(scaled, rows, rtol=0, atol=1e-8)
    torch.testing.assert_close(large / scale, values, rtol=1e-9, atol=0)


@sizes
def test_the_same_bits_for_a_seed(size: int) -> None:
    wanted = moment(size, SPECTRA["decaying slowly"](size))
    before = wanted.clone()
    first = SVD(exact=False, seed=3).axes(wanted, 4)
    torch.manual_seed(1234)
    second, other = SVD(exact=False, seed=3).axes(wanted, 4), SVD(exact=False, seed=4).axes(wanted, 4)
    assert torch.equal(wanted, before)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert torch.equal(first[0], other[0]) == (size == SMALL)
    torch.testing.assert_close(first[0], other[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("spectrum", ["decaying fast", "decaying slowly", "one that stands out"])
def test_a_large_moment_is_not_decomposed_as_a_whole(monkeypatch: pytest.MonkeyPatch, spectrum: str) -> None:
    whole, sizes_seen = torch.linalg.eigh, []

    def seen(given: Tensor) -> Any:
        sizes_seen.append(len(given))
        return whole(given)

    wanted = moment(LARGE, SPECTRA[spectrum](LARGE))
    monkeypatch.setattr(torch.linalg, "eigh", seen)
    SVD(exact=False, seed=0).axes(wanted, 4)
    assert sizes_seen and max(sizes_seen) <= LARGE / 2
    SVD(exact=True, seed=0).axes(wanted, 4)
    assert sizes_seen[-1] == LARGE


# The fewest singular vectors that hold a share ------------------------------------------------------------------------

VALUES: dict[str, Callable[[int], Tensor]] = {
    "flat": lambda k: torch.linspace(1, 0.8, k),
    "decaying": lambda k: torch.exp(-torch.arange(k) / 10.0),
    "slowly": lambda k: 1 / torch.arange(1, k + 1) ** 0.5,
    "rank 1": lambda k: torch.tensor([2.0]),
    "rank 12": lambda k: torch.linspace(2, 1, 12),
}


@exactness
@pytest.mark.parametrize("shape", [(120, 200), (200, 120)], ids=str)
@pytest.mark.parametrize("energy", [0.05, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("values", VALUES)
def test_as_few_as_hold_the_share(shape: tuple[int, int], values: str, energy: float, exact: bool) -> None:
    """More than the first 32 where the spectrum is flat: the number is doubled until it is enough."""
    weight = matrix(shape, VALUES[values](min(shape)))
    shares = torch.linalg.svdvals(weight.double()).square()
    shares = shares.cumsum(0) / shares.sum()
    u, s, vh = svd_by_energy(weight, energy, 1000, SVD(exact, seed=0))
    rank = len(s)
    assert (u.shape, vh.shape) == ((shape[0], rank), (rank, shape[1]))
    assert shares[rank - 1] >= energy - 2e-6
    assert rank == 1 or shares[rank - 2] < energy
    left = (weight.double() - (u.double() * s) @ vh.double()).square().sum() / weight.double().square().sum()
    assert 1 - float(left) >= energy - 1e-4
    assert bool((s[:-1] >= s[1:]).all())
    if values.startswith("rank"):
        assert rank <= int(values.removeprefix("rank "))


@exactness
@pytest.mark.parametrize("most", [1, 7, 32, 33, 40, 119, 120])
def test_not_more_than_the_most(most: int, exact: bool) -> None:
    weight = matrix((120, 200), VALUES["flat"](120))
    for energy in (0.5, 1.0):
        needed = len(svd_by_energy(weight, energy, 1000, SVD(exact, seed=0))[1])
        s = svd_by_energy(weight, energy, most, SVD(exact, seed=0))[1]
        assert len(s) == min(needed, most)
        torch.testing.assert_close(s, torch.linalg.svdvals(weight)[: len(s)], rtol=2e-3, atol=0)


@exactness
@pytest.mark.parametrize("energy", [1e-9, 0.9, 1.0])
def test_nothing_holds_all_of_a_zero_matrix(energy: float, exact: bool) -> None:
    u, s, vh = svd_by_energy(torch.zeros(40, 60), energy, 1000, SVD(exact, seed=0))
    assert (u.shape, s.shape, vh.shape) == ((40, 0), (0,), (0, 60))


@pytest.mark.parametrize("shape", [(1, 30), (30, 1), (1, 1)], ids=str)
def test_a_row_or_a_column_is_one_vector(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vh = svd_by_energy(weight, 0.5, 1000, SVD(exact=False, seed=0))
    torch.testing.assert_close((u * s) @ vh, weight)


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_the_scale_of_the_matrix_does_not_matter(scale: float) -> None:
    weight = matrix((120, 200), VALUES["slowly"](120))
    found = [len(svd_by_energy(weight * factor, 0.9, 1000, SVD(exact=True, seed=0))[1]) for factor in (1, scale)]
    assert found[0] == found[1]
