"""Orthogonal matrices: the Cayley map, principal axes, and axes turned to keep products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from basiscli.linalg.orthogonal import (
    cayley,
    least_product_error,
    nearest_orthogonal,
    orthogonality_error,
    principal_axes,
)

SHAPES = [(1, 1), (5, 5), (64, 64), (3, 2, 4, 16, 16), (0, 8, 8)]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def moment(*shape: int, seed: int = 0) -> Tensor:
    """Return second moments [..., d, d] with energies that fall quickly along random axes."""
    axes = torch.linalg.qr(normal(*shape, seed=seed))[0]
    energy = torch.logspace(0, -3, shape[-1], dtype=torch.float64)
    return axes @ torch.diag(energy) @ axes.mT


def product_error(own: Tensor, other: Tensor, axes: Tensor, rank: int) -> Tensor:
    """Return E (x·y − x U_r U_rᵀ y)² by its definition, tr(P S P M)."""
    kept = axes[..., :rank]
    lost = torch.eye(axes.shape[-1], dtype=torch.float64) - kept @ kept.mT
    return (lost @ own @ lost @ other).diagonal(dim1=-1, dim2=-2).sum(-1)


def mean_log_error(own: Tensor, other: Tensor, axes: Tensor) -> Tensor:
    size = axes.shape[-1]
    unit = max(1, size // 8)
    errors = torch.stack([product_error(own, other, axes, rank) for rank in range(unit, size, unit)])
    return errors.log().mean(0)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_free_parameters_turn_nothing_at_all(shape: tuple[int, ...]) -> None:
    turned = cayley(torch.zeros(shape))
    assert torch.equal(turned, torch.eye(shape[-1]).expand(shape))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-4, 0.1, 1.0, 10.0])
def test_the_cayley_map_is_orthogonal_in_float32(shape: tuple[int, ...], scale: float) -> None:
    turned = cayley(scale * normal(*shape, dtype=torch.float32))
    assert turned.dtype == torch.float32
    assert turned.shape == shape
    # The solve's rounding grows with the size of A; training stays far below a norm of ten.
    assert orthogonality_error(turned) < (1e-5 if scale <= 1 else 1e-4)


def test_the_cayley_map_is_its_formula() -> None:
    free = normal(4, 12, 12, dtype=torch.float32)
    skew = free.double() - free.double().mT
    identity = torch.eye(12, dtype=torch.float64)
    expected = torch.linalg.inv(identity - skew / 2) @ (identity + skew / 2)
    torch.testing.assert_close(cayley(free).double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(cayley(free.double()), expected, rtol=0, atol=1e-12)


def test_the_cayley_maps_derivative_at_zero_is_the_skew_part() -> None:
    free, small = normal(6, 6), 1e-6
    derivative = (cayley(small * free) - cayley(-small * free)) / (2 * small)
    torch.testing.assert_close(derivative, free - free.mT, rtol=0, atol=1e-8)


def test_the_error_of_a_matrix_that_is_not_orthogonal() -> None:
    assert orthogonality_error(torch.eye(3)) == 0
    assert orthogonality_error(torch.diag(torch.tensor([1.0, 2.0]))) == 3
    assert orthogonality_error(torch.stack([torch.eye(2), 1.1 * torch.eye(2)])) == pytest.approx(0.21, abs=1e-6)
    assert orthogonality_error(torch.zeros(0, 4, 4)) == 0


def test_the_nearest_orthogonal_matrix() -> None:
    axes = torch.linalg.qr(normal(3, 7, 7))[0]
    stretched = axes @ (torch.eye(7, dtype=torch.float64) + 0.1 * moment(3, 7, 7))  # axes · positive definite
    torch.testing.assert_close(nearest_orthogonal(stretched), axes, rtol=0, atol=1e-12)
    rounded = nearest_orthogonal(axes.float())
    assert rounded.dtype == torch.float64
    assert orthogonality_error(rounded) < 1e-14
    torch.testing.assert_close(rounded, axes, rtol=0, atol=1e-6)


def test_principal_axes_of_a_known_matrix() -> None:
    turn = 0.3
    cos, sin = torch.cos(torch.tensor(turn)).double(), torch.sin(torch.tensor(turn)).double()
    known = torch.tensor([[cos, -sin], [sin, cos]])
    axes, energy = principal_axes(known @ torch.diag(torch.tensor([5.0, 2.0]).double()) @ known.mT)
    torch.testing.assert_close(energy, torch.tensor([5.0, 2.0]).double())
    # Each axis points so that its largest entry is positive.
    torch.testing.assert_close(axes, torch.tensor([[cos, -sin], [sin, cos]]))


@pytest.mark.parametrize("shape", SHAPES)
def test_principal_axes_rebuild_the_moments(shape: tuple[int, ...]) -> None:
    given = moment(*shape)
    axes, energy = principal_axes(given)
    assert orthogonality_error(axes) < 1e-12
    assert (energy.diff(dim=-1) <= 0).all()
    torch.testing.assert_close(axes * energy[..., None, :] @ axes.mT, given)
    assert (energy >= 0).all()


def test_principal_axes_of_few_tokens_have_no_negative_energy() -> None:
    token = normal(1, 16)
    axes, energy = principal_axes(token.mT @ token)
    assert (energy >= 0).all()
    assert energy[0] == pytest.approx(float(token.square().sum()))
    assert (energy[1:] < 1e-12).all()
    assert orthogonality_error(axes) < 1e-12


def test_axes_that_keep_products_are_never_worse_than_the_start() -> None:
    own, other = moment(3, 2, 16, 16), moment(3, 2, 16, 16, seed=1)
    start = principal_axes(own)[0]
    found = least_product_error(own, other, start)
    assert found.dtype == torch.float64
    assert orthogonality_error(found) < 1e-12
    before, after = mean_log_error(own, other, start), mean_log_error(own, other, found)
    assert (after <= before + 1e-6).all()
    assert (after < before - 0.1).all()  # random axes leave much to gain


def test_with_no_step_the_axes_are_the_start() -> None:
    own = moment(2, 8, 8)
    start = principal_axes(own)[0]
    found = least_product_error(own, moment(2, 8, 8, seed=1), start, steps=0)
    torch.testing.assert_close(found, start, rtol=0, atol=1e-6)  # it was float32 in between


def test_axes_that_keep_products_look_where_the_other_side_is() -> None:
    """What x says along its strongest axis is lost on a y that has nothing there: the other axis is kept."""
    own = torch.diag(torch.tensor([4.0, 1.0]).double())
    other = torch.diag(torch.tensor([0.01, 1.0]).double())
    # A radian off the principal axes, which are a minimum of their own.
    free = torch.tensor([[0.0, 1.09], [0.0, 0.0]]).double()
    start = principal_axes(own)[0] @ cayley(free)
    found = least_product_error(own, other, start)
    assert float(product_error(own, other, start, 1)) > 0.9
    assert float(product_error(own, other, found, 1)) == pytest.approx(0.04, rel=1e-3)
    torch.testing.assert_close(found[:, 0].abs(), torch.tensor([0.0, 1.0]).double(), rtol=0, atol=1e-2)


def test_the_scale_of_the_moments_does_not_matter() -> None:
    own, other = moment(2, 8, 8), moment(2, 8, 8, seed=1)
    start = principal_axes(own)[0]
    found = least_product_error(own, other, start)
    torch.testing.assert_close(least_product_error(1e9 * own, other, start), found, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (3, 4, 4), (12, 12), (0, 8, 8)])
def test_axes_that_keep_products_of_odd_sizes(shape: tuple[int, ...]) -> None:
    own, other = moment(*shape), moment(*shape, seed=1)
    start = principal_axes(own)[0]
    found = least_product_error(own, other, start, steps=20)
    assert found.shape == shape
    assert torch.isfinite(found).all()
    assert orthogonality_error(found) < 1e-12


def test_heads_that_never_spoke_keep_their_axes() -> None:
    own = torch.stack([torch.zeros(8, 8, dtype=torch.float64), moment(8, 8)])
    other = torch.stack([moment(8, 8, seed=1), torch.zeros(8, 8, dtype=torch.float64)])
    found = least_product_error(own, other, principal_axes(own)[0], steps=20)
    assert orthogonality_error(found) < 1e-12
