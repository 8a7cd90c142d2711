"""The projection step of sequential orthogonal merging, which adds a task vector to a merged one.

Source: Tang et al., 'Merging Models on the Fly Without Retraining', arXiv 2501.09522, equations 3 to 6. With
`S = U Σ Vᵀ` and r the number of leading singular triplets that hold the share α of the sum of singular values,

    clean(T) = T − U_r (U_rᵀ T V_r) V_rᵀ − Σ_{i≥r} (u_iᵀ T v_i) u_i v_iᵀ,      S ← S + clean(T).

Both corrections live in the bases U and V, so together they are `U M Vᵀ` with C = Uᵀ T V and M made of C's leading
r×r block and the rest of its diagonal. On a tall S (a wide one is transposed) V and Σ² are the eigenvectors and
eigenvalues of the n×n matrix SᵀS, and U = S V Σ⁻¹ is made in blocks of rows: an lm_head of 128k × 4k needs one
4k × 4k decomposition and nothing 128k wide.

What needs float64 is SᵀS and its eigenvectors, where small singular values are squared, and S V for the small ones,
whose rounding the division by σ magnifies. The other products are done in float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from basiscli.linalg.eigen import eigh
from basiscli.linalg.lowrank import LowRank

_BLOCK_ELEMENTS = 1 << 22  # rows of the long side handled at a time: 16 MB in float32
_PANELS = 4
_SMALL = 0.03  # share of the largest singular value below which a direction counts as small
_KEEP_ELEMENTS = 1 << 26  # up to this size U is kept between its two uses (256 MB), past it U is made twice


def project_and_add(
    merged: Tensor | LowRank, update: Tensor | LowRank, alpha: float, noise: float = 0.0
) -> tuple[Tensor | LowRank, int]:
    """Return `merged + clean(update)` and r, the number of singular directions that are closed to the update.

        merged: Tensor | LowRank = task_vectors[0]  # [out, in], a fine-tune's weight minus the base's
        for update in task_vectors[1:]:
            merged, r = project_and_add(merged, update, alpha=0.8)

    Two low-rank inputs give a low-rank result whose rank is at most the sum of theirs; any dense input, a dense one.

    Args:
        merged: S, the merged task vector so far, [m, n], float32.
        update: T, the task vector to add, [m, n].
        alpha: share of the sum of singular values of S whose directions are closed to the update, in [0, 1].
        noise: singular values of a dense S up to this one are ignored as rounding; see `rounding_noise`.
    """
    if isinstance(merged, LowRank) and isinstance(update, LowRank):
        return _add_low_rank(merged, update, alpha)
    dense = merged.dense() if isinstance(merged, LowRank) else merged
    dense_update = update.dense() if isinstance(update, LowRank) else update
    if dense.shape[0] < dense.shape[1]:
        result, r = _add_tall(dense.mT, dense_update.mT, alpha, noise)
        return result.mT, r
    return _add_tall(dense, dense_update, alpha, noise)


def rounding_noise(weight_norm: float, shape: tuple[int, int]) -> float:
    """Return a bound of the singular values that float32 storage of a weight adds to its task vector.

    Rounding to nearest moves an element at random, with a standard deviation of about ε₃₂/5 of it; the largest singular
    value of such a matrix is that times (√m + √n). Twice this is the bound. A LoRA update merged into float32 weights
    is of low rank but for this noise.

    Args:
        weight_norm: Frobenius norm of the stored weight.
        shape: its [m, n].
    """
    m, n = shape
    return 0.4 * torch.finfo(torch.float32).eps * weight_norm / math.sqrt(m * n) * (math.sqrt(m) + math.sqrt(n))


def leading_count(sigma: Tensor, alpha: float) -> int:
    """Return r: the smallest index at which cumsum(σ)/sum(σ) exceeds alpha.

    The paper's index of the first true value, so that r triplets come before it. At α = 1 only rounding would decide;
    there, all triplets count.

    Args:
        sigma: positive singular values [k] in falling order.
        alpha: a share in [0, 1].
    """
    if alpha >= 1.0:
        return sigma.numel()
    shares = sigma.double().cumsum(0) / sigma.double().sum()
    return int((shares <= alpha).sum())


def _add_tall(merged: Tensor, update: Tensor, alpha: float, noise: float) -> tuple[Tensor, int]:
    """Do the step for dense (m, n) with m ≥ n."""
    rows, n = merged.shape
    step = max(1, _BLOCK_ELEMENTS // max(n, 1))
    blocks = [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]
    squares, vectors = eigh(_lower_gram(merged, blocks))
    sigma = squares.flip(0).clamp_min_(0.0).sqrt_()
    sigma = sigma[: _count_directions(sigma, noise)]
    if sigma.numel() == 0:
        return merged + update, 0
    r = leading_count(sigma, alpha)
    vectors = vectors.flip(1)[:, : sigma.numel()]
    v, v_over_sigma = vectors.to(merged.dtype), vectors / sigma

    large = int((sigma > _SMALL * sigma[0]).sum())

    # C's leading block and diagonal, summed over blocks of rows.
    keep = merged.numel() <= _KEEP_ELEMENTS
    kept: list[Tensor] = []
    leading, diagonal = v.new_zeros(r, r), v.new_zeros(sigma.numel())
    for block in blocks:
        u, tv = _left_vectors(merged[block], v_over_sigma, large), update[block] @ v
        leading.addmm_(u[:, :r].mT, tv[:, :r])
        diagonal += torch.linalg.vecdot(u, tv, dim=0)
        if keep:
            kept.append(u)
    # M Vᵀ, whose rows past r are those of Vᵀ times C's diagonal.
    mv = (v * diagonal).mT
    mv[:r] = leading @ v[:, :r].mT
    result = torch.empty_like(merged)
    for number, block in enumerate(blocks):
        u = kept[number] if keep else _left_vectors(merged[block], v_over_sigma, large)
        torch.add(merged[block], update[block], out=result[block])
        result[block].addmm_(u, mv, alpha=-1.0)
    return result, r


def _lower_gram(s: Tensor, blocks: list[slice]) -> Tensor:
    """Return SᵀS in float64, its lower triangle only (all that eigh reads): panels of columns save a third of it."""
    n = s.shape[1]
    own = torch.zeros(n, n, dtype=torch.float64, device=s.device)
    width = -(-n // _PANELS) or 1
    for block in blocks:
        rows = s[block].double()
        for begin in range(0, n, width):
            panel = slice(begin, begin + width)
            own[begin:, panel].addmm_(rows[:, begin:].mT, rows[:, panel])
    return own


def _left_vectors(rows: Tensor, v_over_sigma: Tensor, large: int) -> Tensor:
    """Return rows of U = S V Σ⁻¹; the columns past `large` belong to small singular values and need float64."""
    u = rows @ v_over_sigma.to(rows.dtype)
    if large < v_over_sigma.shape[1]:
        u[:, large:] = (rows.double() @ v_over_sigma[:, large:]).to(rows.dtype)
    return u


def _add_low_rank(merged: LowRank, update: LowRank, alpha: float) -> tuple[LowRank, int]:
    """Do the step in factors: S + clean(T) = U (Σ − M) Vᵀ + B A."""
    u, sigma, vh = merged.svd()
    if sigma.numel() == 0:
        return merged + update, 0
    r = leading_count(sigma, alpha)
    b, a = update.b.double(), update.a.double()
    c = (u.mT @ b) @ (a @ vh.mT)
    core = torch.diag(sigma - c.diagonal())  # Σ − M
    core[:r, :r] = torch.diag(sigma[:r]) - c[:r, :r]
    dtype = update.b.dtype
    return LowRank(torch.cat([u @ core, b], 1).to(dtype), torch.cat([vh, a], 0).to(dtype), merged.shape), r


def _count_directions(sigma: Tensor, noise: float) -> int:
    """Return how many of the singular values, falling, belong to directions and not to rounding noise.

    The squares come from a float64 Gram matrix, whose own rounding puts a floor of √(ε₆₄·n)·σ₁ under what can be
    told from zero; for the sizes of models that is at or below float32's resolution, the resolution of S itself.
    """
    if sigma.numel() == 0:
        return 0
    floor = math.sqrt(torch.finfo(torch.float64).eps * sigma.numel()) * float(sigma[0])
    return int((sigma > max(floor, noise)).sum())
