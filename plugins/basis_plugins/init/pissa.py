"""PiSSA: the adapter begins as the principal part of the weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from basiscli import transform

if TYPE_CHECKING:
    from torch import Tensor

    from basiscli.linalg.svd import SVD


@transform("init", principal=True, source="Meng et al., 'PiSSA', arXiv 2404.02948")
def pissa(weight: Tensor, rank: int, svd: SVD) -> tuple[Tensor, Tensor]:
    """Principal singular values and vectors: B = U_r √Σ_r, A = √Σ_r V_rᵀ.

    The base keeps the rest, so that training moves what matters most in the weight and leaves its noise alone.
    """
    u, s, vh = svd.top(weight, rank)
    root = s.sqrt()
    return u * root, root[:, None] * vh
