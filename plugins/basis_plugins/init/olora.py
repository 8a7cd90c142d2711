"""OLoRA: the adapter begins with orthonormal columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from basiscli import transform

if TYPE_CHECKING:
    from torch import Tensor


@transform("init", principal=True, source="Büyükakyüz, 'OLoRA', arXiv 2406.01775")
def olora(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """QR decomposition of the weight: B = Q_r, A = R_r, the first r columns and rows."""
    import torch

    q, r = torch.linalg.qr(weight)
    return q[:, :rank], r[:rank]
