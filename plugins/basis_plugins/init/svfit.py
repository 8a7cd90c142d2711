"""SVFit: the weight's largest singular values are trained, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from basiscli import transform

if TYPE_CHECKING:
    from torch import Tensor

    from basiscli.linalg.svd import SVD


@transform("init", trains="values", source="Sun et al., 'SVFit', arXiv 2409.05926")
def svfit(weight: Tensor, rank: int, svd: SVD) -> tuple[Tensor, Tensor, Tensor]:
    """Principal singular values between their vectors: B = U_r, σ = Σ_r, A = V_rᵀ.

    The base keeps the rest, and the vectors stay as they are: training changes how much of each direction there is.
    """
    return svd.top(weight, rank)
