"""Orthogonal matrices: Cayley map, polar factor, principal axes, and axes that preserve products."""

from __future__ import annotations

import torch
from torch import Tensor

from basiscli.linalg.eigen import eigh


def cayley(free: Tensor) -> Tensor:
    """Return the orthogonal matrices `(I − A/2)⁻¹ (I + A/2)` of A = X − Xᵀ.

    X = 0 gives the identity exactly, and the derivative there is A itself, so that learning rates keep their meaning.

    Args:
        free: unconstrained X [..., d, d], float32 or wider.
    """
    skew = free - free.mT
    identity = torch.eye(free.shape[-1], dtype=free.dtype, device=free.device)
    turned: Tensor = torch.linalg.solve(identity - skew / 2, identity + skew / 2)
    return turned


def orthogonality_error(bases: Tensor) -> float:
    """Return the largest |UᵀU − I| over all matrices of [..., d, d], computed in float64."""
    wide = bases.double()
    identity = torch.eye(bases.shape[-1], dtype=torch.float64, device=bases.device)
    return float((wide.mT @ wide - identity).abs().max()) if bases.numel() else 0.0


def nearest_orthogonal(bases: Tensor) -> Tensor:
    """Return the orthogonal matrices nearest to [..., d, d] (the polar factor), in float64."""
    u, _, vh = torch.linalg.svd(bases.double())
    polar: Tensor = u @ vh
    return polar


def principal_axes(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvectors and eigenvalues of second moments [..., d, d], the largest first.

    Returns:
        Orthogonal U [..., d, d] with one axis per column, and the energy (eigenvalue) of each [..., d], both float64.
    """
    energy, axes = eigh(moments.double())
    return signed(axes.flip(-1)), energy.flip(-1).clamp_min(0)


def signed(axes: Tensor) -> Tensor:
    """Return columns [..., d, r] with the largest entry of each positive: decompositions leave the sign open."""
    largest = axes.gather(-2, axes.abs().argmax(-2, keepdim=True))
    return axes * largest.sign()


def least_product_error(own: Tensor, other: Tensor, start: Tensor, steps: int = 300) -> Tensor:
    """Return axes whose truncation at any rank changes the products x·y least.

    With x of second moment S and y of second moment M, independent of each other, keeping the first r columns of U
    leaves the mean squared error E (x·y − x U_r U_rᵀ y)² = tr(P S P M), P = I − U_r U_rᵀ, where the principal axes of x
    ignore M. Minimised is the mean over r = d/8, …, 7d/8 of its logarithm, which weighs all ranks equally.

    Args:
        own: S, [..., d, d]: of keys, or of values.
        other: M, [..., d, d]: of queries, or W_oᵀ W_o for values, whose products are the layer's output.
        start: orthogonal axes to begin with.
        steps: of Adam, on all d × d problems at once.

    Returns:
        Orthogonal axes [..., d, d] in float64, never worse than the start.
    """
    size = own.shape[-1]
    unit = size // 8 or 1
    ranks = torch.arange(unit, size, unit, device=own.device)
    scale = (own * other.mT).sum((-1, -2), keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    s, m, axes = (own / scale).float(), other.float(), start.float()

    def objective(free: Tensor) -> Tensor:
        u = axes @ cayley(free)
        products = (u.mT @ s @ u) * (u.mT @ m @ u).mT
        tails = products.flip(-1, -2).cumsum(-1).cumsum(-2).flip(-1, -2).diagonal(dim1=-1, dim2=-2)[..., ranks]
        return tails.clamp_min(1e-9).log().mean(-1)

    free = torch.zeros_like(axes).requires_grad_(True)
    optimiser = torch.optim.Adam([free], lr=0.02)
    with torch.enable_grad():
        for _ in range(steps):
            optimiser.zero_grad()
            objective(free).sum().backward()
            optimiser.step()
    with torch.no_grad():
        better = objective(free) < objective(torch.zeros_like(free))
        return nearest_orthogonal(torch.where(better[..., None, None], axes @ cayley(free), axes))
