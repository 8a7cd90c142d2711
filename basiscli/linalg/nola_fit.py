"""Fit of NOLA coefficients to a given low-rank update, by alternating least squares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from basiscli.linalg.lowrank import LowRank
from basiscli.linalg.nola import start_of
from basiscli.linalg.randbasis import RandomBases

_ROUNDS = 20
_ENOUGH = 1e-3  # a round that gains less of the whole is the last


@dataclass(frozen=True)
class Fit:
    """Fitted coefficients, and the share of the target that they explain."""

    a: Tensor
    """Coefficients of A's bases [k]."""
    b: Tensor
    """Coefficients of B's bases [k]."""
    share: float
    """1 − ‖s B A − T‖² / ‖T‖² in the norm of the metric."""


def fit(
    target: LowRank,
    bases_a: RandomBases,
    bases_b: RandomBases,
    scaling: float,
    metric: Tensor | None,
    *,
    noise: float = 1e-6,
) -> Fit:
    """Return the coefficients of A = Σ aᵢAᵢ and B = Σ bⱼBⱼ that minimise tr (s B A − T) C (s B A − T)ᵀ.

    With C the second moments x xᵀ of the inputs it is the squared error of the output s B A x; without, that of the
    matrix. With one factor fixed, the other's coefficients solve a linear least-squares problem of k unknowns; the two
    take turns until a round gains less than 10⁻³. Memory is 4·k·r·(2·in + out) bytes, for all bases of the module.

    Args:
        target: T [out, in].
        bases_a: of A [r, in].
        bases_b: of B [out, r].
        scaling: s, the adapter's α/r.
        metric: C, symmetric positive semidefinite [in, in]; None for the identity.
        noise: variance of the error that storage adds to coefficients of variance 1. Its expected effect is minimised
            with the rest, which is a ridge of `noise` times the mean diagonal: bases that nearly span a factor are
            ill-conditioned, and large coefficients that cancel would not survive rounding.
    """
    all_a, all_b = (bases.rows(slice(None), target.a.device) * bases.bound for bases in (bases_a, bases_b))
    rank, wide = bases_a.shape
    weighted = all_a if metric is None else (all_a.view(-1, wide) @ metric).view_as(all_a)
    target_c = target.a if metric is None else target.a @ metric  # A₀ C
    whole = float(((target.b.mT @ target.b).double() * (target_c @ target.a.mT).double()).sum())
    a = start_of(bases_a).to(all_a)
    b, share = torch.zeros(bases_b.count).to(all_b), 0.0
    if whole <= 0:
        return Fit(a, b, 1.0)
    for _ in range(_ROUNDS):
        before = share
        big_a, a_c = (a @ all_a).view(rank, wide), (a @ weighted).view(rank, wide)
        b, _ = _solve(
            all_b.view(-1, rank), scaling**2 * (a_c @ big_a.mT), scaling * target.b @ (target_c @ big_a.mT), noise
        )
        big_b = (b @ all_b).view(-1, rank)
        gram = scaling**2 * (big_b.mT @ big_b)
        wanted = scaling * (big_b.mT @ target.b) @ target_c
        a, held = _solve_rows(all_a, weighted, gram, wanted, noise)
        share = held / whole
        if share - before < _ENOUGH:
            break
    # ΔW does not depend on how the two share its size; training does.
    size = a.square().mean().sqrt().clamp_min(1e-30)
    product = LowRank(scaling * big_b, (a @ all_a).view(rank, wide), target.shape)
    return Fit(a / size, b * size, explained_share(target, product, metric)[0])


def explained_share(target: LowRank, product: LowRank, metric: Tensor | None) -> tuple[float, float]:
    """Return 1 − ‖product − T‖² / ‖T‖² and ‖T‖, in the norm of the metric [in, in] (None: Frobenius)."""

    def inner(x: LowRank, y: LowRank) -> float:
        weighted = x.a if metric is None else x.a @ metric
        return float(((x.b.mT @ y.b).double() * (weighted @ y.a.mT).double()).sum())

    whole = max(0.0, inner(target, target))
    error = inner(product, product) - 2 * inner(product, target) + whole
    return (1 - max(0.0, error) / whole if whole else 1.0), whole**0.5


def _solve(rows: Tensor, gram: Tensor, wanted: Tensor, noise: float) -> tuple[Tensor, float]:
    """Solve for the coefficients of bases Bⱼ (rows [k·out, r]) with ⟨Bᵢ Q, Bⱼ⟩ b = ⟨Bⱼ, wanted⟩."""
    flat = rows.view(-1, wanted.numel())
    return _normal((rows @ gram).view_as(flat) @ flat.mT, flat @ wanted.flatten(), noise)


def _solve_rows(flat: Tensor, weighted: Tensor, gram: Tensor, wanted: Tensor, noise: float) -> tuple[Tensor, float]:
    """Solve for the coefficients of bases Aᵢ with ⟨Q Aᵢ C, Aⱼ⟩ a = ⟨Aⱼ, wanted⟩."""
    left = (gram @ weighted.view(len(flat), *wanted.shape)).view_as(flat)
    return _normal(left @ flat.mT, flat @ wanted.flatten(), noise)


def _normal(matrix: Tensor, right: Tensor, noise: float) -> tuple[Tensor, float]:
    """Solve normal equations in float64; return the solution and the squared norm that it takes off the target."""
    wide = (matrix + matrix.mT).double() / 2
    wide.diagonal().add_(noise * wide.diagonal().mean().clamp_min(1e-300))
    solution = torch.linalg.solve(wide, right.double())
    held = 2 * solution @ right.double() - solution @ wide @ solution
    return solution.to(right.dtype), float(held)
