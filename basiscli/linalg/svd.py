"""Truncated SVD: exact by the smaller Gram matrix, or fast by block Krylov iteration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from basiscli.linalg.eigen import eigh
from basiscli.linalg.orthogonal import principal_axes, signed

TOLERANCE = 3e-3
"""Of `fast_svd`: largest `subspace_residual`."""
MOMENT_TOLERANCE = 1e-7  # errors of eigenvectors and values are its square, relative to their distances
_FIRST_CAPTURED = 32
_SMALL_MOMENT = 1024  # up to here the whole decomposition costs less than a second
_MOST_COLUMNS = 0.5  # of the smaller side: beyond it the exact decomposition is cheaper
_REFINEMENTS = 2  # block steps between two looks at the residual


@dataclass(frozen=True)
class SVD:
    """Truncated decompositions of matrices, exact or fast.

        svd = SVD(exact=False, seed=0)
        u, s, vh = svd.top(weight, rank=16)
        b, a = u * s.sqrt(), s.sqrt()[:, None] * vh  # PiSSA's factors

    An `init` method that asks for `svd` gets one.
    """

    exact: bool
    """Whether `top` and `axes` use the full decomposition of a Gram matrix."""
    seed: int
    """Of the fast iteration's start."""

    def top(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return U [m, r], σ [r], Vᵀ [r, n] of the r largest singular values of a float32 matrix [m, n]."""
        return exact_svd(weight, rank) if self.exact else fast_svd(weight, rank, seed=self.seed)

    def axes(self, moment: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the leading eigenvectors as rows [count, n], and eigenvalues [count], of a float64 moment [n, n].

        The largest entry of each vector is positive. Without `exact` the residual is at most 1e-7, measured.
        """
        if self.exact or len(moment) <= _SMALL_MOMENT:
            axes, values = principal_axes(moment)
            return axes[:, :count].mT.clone(), values[:count]  # a view would keep all axes alive
        # U's columns are orthonormal even where the moment has fewer directions than are asked for; V's are not.
        columns, values, _ = fast_svd(moment, count, seed=self.seed, tolerance=MOMENT_TOLERANCE)
        return signed(columns).mT, values

    def bottom(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return U [m, r], σ [r], Vᵀ [r, n] of the r smallest singular values; always exact."""
        return exact_svd(weight, rank, largest=False)


def exact_svd(weight: Tensor, rank: int, *, largest: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Return a truncated SVD by the eigenvectors of the smaller Gram matrix, computed in float64.

    Two to three times faster than a full SVD on a CPU. Singular values below 1e-8 of the largest are rounding; u σ vᵀ
    is right for them, too, since it is computed as (W v) vᵀ, but their u need not be of length one.

    Args:
        weight: [m, n].
        rank: how many, at most min(m, n).
        largest: whether of the largest or of the smallest singular values.

    Returns:
        U [m, r], σ [r] in falling order, Vᵀ [r, n], in the weight's dtype.
    """
    if weight.shape[0] < weight.shape[1]:
        u, s, vh = exact_svd(weight.mT, rank, largest=largest)
        return vh.mT.contiguous(), s, u.mT.contiguous()
    wide = weight.double()
    _, vectors = eigh(wide.mT @ wide)
    v = (vectors[:, -rank:] if largest else vectors[:, :rank]).flip(-1)
    projected = wide @ v
    s = projected.norm(dim=0)
    u = projected / s.clamp_min(torch.finfo(torch.float64).tiny)
    return u.to(weight), s.to(weight), v.mT.to(weight).contiguous()


def fast_svd(weight: Tensor, rank: int, *, seed: int, tolerance: float = TOLERANCE) -> tuple[Tensor, Tensor, Tensor]:
    """Return a truncated SVD by block Krylov iteration from a seeded random start (Musco and Musco 2015, algorithm 2).

    Subspace iteration keeps its last block only, and on the flat spectra of language models' weights it is still far
    off after sixteen rounds; the space of all blocks together converges quadratically faster. The iteration ends when
    the residual is within the tolerance; a matrix where that takes half of its columns is decomposed exactly.

    Args:
        weight: [m, n], float32 or float64.
        rank: r.
        seed: of the start, which is drawn on the CPU and the same everywhere.
        tolerance: largest `subspace_residual` of the result.

    Returns:
        U [m, r], σ [r] in falling order, Vᵀ [r, n], in the weight's dtype.
    """
    if weight.shape[0] > weight.shape[1]:
        u, s, vh = fast_svd(weight.mT, rank, seed=seed, tolerance=tolerance)
        return vh.mT.contiguous(), s, u.mT.contiguous()
    most = int(_MOST_COLUMNS * weight.shape[0])
    generator = torch.Generator().manual_seed(seed)
    block = rank + min(rank, 8)
    if 3 * block > most:
        return exact_svd(weight, rank)
    start = torch.randn(weight.shape[1], block, generator=generator, dtype=weight.dtype).to(weight)
    # The bases are kept as rows: a few rows times a matrix is up to twice as fast as a matrix times a few columns.
    left = _orthonormal(start.mT @ weight.mT)
    right = left @ weight
    while len(left) + _REFINEMENTS * block <= most:
        for _ in range(_REFINEMENTS):
            new = right[-block:] @ weight.mT
            for _ in range(2):  # once leaves what float32 rounds, all there is where the rank is exhausted
                new = _orthonormal(new - (new @ left.mT) @ left)
            left, right = torch.cat([left, new]), torch.cat([right, new @ weight])
        ut, s, vh = _best_within(left, right, rank)
        # Wᵀ u = σ v by the way they are made, so that W v = σ u is all of the residual.
        if float((vh @ weight.mT - s[:, None] * ut).norm(dim=1).max()) <= tolerance * float(s.max()):
            return ut.mT.contiguous(), s, vh
    return exact_svd(weight, rank)


def _orthonormal(rows: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(rows.mT)[0].mT
    return basis


def _best_within(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return Uᵀ, σ and Vᵀ of W's leading singular vectors within the rows of an orthonormal Q [k, m], given Q W."""
    small = right.double()
    _, vectors = eigh(small @ small.mT)
    within = vectors[:, -rank:].flip(-1).mT.contiguous()
    projected = within @ small
    s = projected.norm(dim=1)
    vh = projected / s.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
    return within.to(left) @ left, s.to(left), vh.to(left)


def subspace_residual(weight: Tensor, u: Tensor, s: Tensor, vh: Tensor) -> float:
    """Return the largest ‖Wᵀ uᵢ − σᵢ vᵢ‖ / σ₁ or ‖W vᵢ − σᵢ uᵢ‖ / σ₁: zero for exact singular vectors."""
    if not s.numel() or float(s.max()) == 0:
        return 0.0
    right = (weight.mT @ u - vh.mT * s).norm(dim=0).max()
    left = (weight @ vh.mT - u * s).norm(dim=0).max()
    return float(torch.maximum(left, right) / s.max())


def svd_by_energy(weight: Tensor, energy: float, most: int, svd: SVD) -> tuple[Tensor, Tensor, Tensor]:
    """Return the SVD truncated at the smallest rank that holds a share of ‖W‖²; rank 0 for a zero matrix.

    Args:
        weight: [m, n] float32.
        energy: the share, at most 1.
        most: largest rank, even if it holds less.
        svd: the decomposition to use; its rank is doubled until it is enough.

    Returns:
        U [m, r], σ [r] in falling order, Vᵀ [r, n].
    """
    total = float(weight.square().sum(dtype=torch.float64))
    most = min(most, *weight.shape)
    rank = min(most, _FIRST_CAPTURED)
    while True:
        u, s, vh = svd.top(weight, rank)
        held = s.double().square().cumsum(0)
        # Rounding of a sum of squares: a share of 1 shall not ask for directions of noise below it.
        enough = int((held < (energy - 1e-6) * total).sum()) + 1 if total else 0
        if enough <= rank or rank == most:
            kept = min(enough, rank)
            return u[:, :kept], s[:kept], vh[:kept]
        rank = min(most, 2 * rank)
