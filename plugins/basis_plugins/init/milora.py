"""MiLoRA: the adapter begins as the minor part of the weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from basiscli import transform

if TYPE_CHECKING:
    from torch import Tensor

    from basiscli.linalg.svd import SVD


@transform("init", source="Wang et al., 'MiLoRA', arXiv 2406.09044")
def milora(weight: Tensor, rank: int, svd: SVD) -> tuple[Tensor, Tensor]:
    """The smallest singular values and their vectors: B = U √Σ, A = √Σ Vᵀ.

    What the base learned most stays frozen; training has the directions that it hardly uses.
    """
    u, s, vh = svd.bottom(weight, rank)
    root = s.sqrt()
    return u * root, root[:, None] * vh
