"""Leading and trailing singular vectors: exactly by the smaller Gram matrix, or fast by a block Krylov iteration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 3e-3
_MOST_COLUMNS = 0.5  # of the smaller side: beyond it the exact decomposition is cheaper
_REFINEMENTS = 2  # block steps between two looks at the residual


@dataclass(frozen=True)
class SVD:
    """How a command decomposes matrices; what an `init` method is given as `svd`."""

    exact: bool
    seed: int

    def top(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return U [m, r], σ [r] and Vᵀ [r, n] of the r largest singular values of a float32 matrix [m, n]."""
        return exact_svd(weight, rank) if self.exact else fast_svd(weight, rank, seed=self.seed)

    def bottom(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same of the r smallest singular values; always exact."""
        return exact_svd(weight, rank, largest=False)


def exact_svd(weight: Tensor, rank: int, *, largest: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose by the eigenvectors of the smaller Gram matrix, everything in float64.

    Two to three times faster than a full SVD on a CPU. Singular values below 1e-8 of the largest are rounding; u σ vᵀ
    is right for them, too, since it is computed as (W v) vᵀ, but their u need not be of length one.

    Args:
        weight: [m, n].
        rank: how many, at most min(m, n).
        largest: whether the largest or the smallest singular values are wanted.

    Returns:
        U [m, r], σ [r] in falling order, Vᵀ [r, n], float32.
    """
    if weight.shape[0] < weight.shape[1]:
        u, s, vh = exact_svd(weight.mT, rank, largest=largest)
        return vh.mT.contiguous(), s, u.mT.contiguous()
    wide = weight.double()
    _, vectors = torch.linalg.eigh(wide.mT @ wide)
    v = (vectors[:, -rank:] if largest else vectors[:, :rank]).flip(-1)
    projected = wide @ v
    s = projected.norm(dim=0)
    u = projected / s.clamp_min(torch.finfo(torch.float64).tiny)
    return u.float(), s.float(), v.mT.float().contiguous()


def fast_svd(weight: Tensor, rank: int, *, seed: int, tolerance: float = TOLERANCE) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose by block Krylov iteration from a seeded random start (Musco and Musco 2015, algorithm 2).

    Subspace iteration keeps its last block only, and on the flat spectra of language models' weights it is still far
    off after sixteen rounds; the space of all blocks together converges quadratically faster. The iteration ends when
    the singular vectors are right to the tolerance, measured; a matrix where that takes half of its columns is
    decomposed exactly.

    Args:
        weight: [m, n] float32.
        rank: r.
        seed: of the start, which is drawn on the CPU and the same everywhere.
        tolerance: of `subspace_residual`.

    Returns:
        U [m, r], σ [r] in falling order, Vᵀ [r, n], float32.
    """
    if weight.shape[0] > weight.shape[1]:
        u, s, vh = fast_svd(weight.mT, rank, seed=seed, tolerance=tolerance)
        return vh.mT.contiguous(), s, u.mT.contiguous()
    most = int(_MOST_COLUMNS * weight.shape[0])
    generator = torch.Generator().manual_seed(seed)
    block = rank + min(rank, 8)
    if 3 * block > most:
        return exact_svd(weight, rank)
    start = torch.randn(weight.shape[1], block, generator=generator).to(weight)
    basis = torch.linalg.qr(weight @ start)[0]
    last = basis
    while basis.shape[1] + _REFINEMENTS * block <= most:
        for _ in range(_REFINEMENTS):
            new = weight @ (weight.mT @ last)
            for _ in range(2):  # once leaves what float32 rounds, all there is where the rank is exhausted
                new = torch.linalg.qr(new - basis @ (basis.mT @ new))[0]
            last = new
            basis = torch.cat([basis, last], 1)
        found = _best_within(basis, weight, rank)
        if subspace_residual(weight, *found) <= tolerance:
            return found
    return exact_svd(weight, rank)


def _best_within(basis: Tensor, weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular vectors of W restricted to a subspace [m, k] (Rayleigh-Ritz)."""
    small = (basis.mT @ weight).double()
    _, vectors = torch.linalg.eigh(small @ small.mT)
    left = vectors[:, -rank:].flip(-1)
    projected = left.mT @ small
    s = projected.norm(dim=1)
    vh = projected / s.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
    return basis @ left.float(), s.float(), vh.float()


def subspace_residual(weight: Tensor, u: Tensor, s: Tensor, vh: Tensor) -> float:
    """Return the largest ‖Wᵀ uᵢ − σᵢ vᵢ‖ / σ₁ or ‖W vᵢ − σᵢ uᵢ‖ / σ₁: zero for exact singular vectors."""
    if not s.numel() or float(s.max()) == 0:
        return 0.0
    right = (weight.mT @ u - vh.mT * s).norm(dim=0).max()
    left = (weight @ vh.mT - u * s).norm(dim=0).max()
    return float(torch.maximum(left, right) / s.max())
