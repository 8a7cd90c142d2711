"""What stands in a model's attention while its bases are found: statistics, and projections with a gradient."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from basiscli.runtime.kv_projection import plain_attention


class Moments(nn.Module):
    """Dense attention that adds up second moments of what it sees.

    `keys` and `values` are float64 sums of kᵀk and vᵀv [KV heads, d, d]; `queries` is the same of the queries, summed
    over the group of heads that shares a KV head. The products are float32, a forward's at a time.

    Threads may run the model side by side: each has sums of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self._here = threading.local()

    @property
    def sums(self) -> dict[str, Tensor]:
        """This thread's."""
        found: dict[str, Tensor] = self._here.sums
        return found

    def begin(self) -> None:
        """Let this thread's sums begin at nothing."""
        self._here.sums = {}

    def count(self, tokens: Tensor | None) -> None:
        """Say which tokens of this thread's next forward count [batch, tokens]: padding does not; None for all."""
        self._here.counted = tokens

    def forward(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        """Attend and add."""
        sums, counted = self.sums, self._here.counted
        grouped = query.unflatten(1, (key.shape[1], -1))  # [B, H, G, T, d]
        for name, x in (("keys", key[:, :, None]), ("values", value[:, :, None]), ("queries", grouped)):
            rows = x.detach().transpose(0, 1).float()  # [H, B, G, T, d]
            if counted is not None:
                rows = rows * counted[None, :, None, :, None]
            rows = rows.flatten(1, 3)
            moment = (rows.mT @ rows).double().cpu()
            sums[name] = sums[name] + moment if name in sums else moment
        return plain_attention(query, key, value, *rest)


class Projector(nn.Module):
    """Attention over projected keys and values: k P_K and v P_V, with P = U_r U_rᵀ [(batch,) KV heads, d, d].

    The same numbers as with coefficients, since (q U)(k U)ᵀ = q (k U Uᵀ)ᵀ, but with a gradient and with ranks that may
    differ within a batch. Without projections it is the dense attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def forward(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        """Project and attend."""
        if self.key is not None and self.value is not None:
            key, value = key @ self.key.to(key.dtype), value @ self.value.to(value.dtype)
        return plain_attention(query, key, value, *rest)


def cut_projections(bases: Tensor, strength: Tensor) -> Tensor:
    """Return U diag(s) Uᵀ for bases [..., d, d] and the strengths of their columns [..., d]: 1 for one that is kept."""
    return (bases * strength[..., None, :].to(bases.dtype)) @ bases.mT


def set_projections(projectors: Sequence[Projector], projections: Tensor) -> None:
    """Project in all layers by these matrices [layers, 2, KV heads, d, d]."""
    for projector, (key, value) in zip(projectors, projections, strict=True):
        projector.key, projector.value = key, value


def set_bases(projectors: Sequence[Projector], bases: Tensor | None, ranks: Tensor | None = None) -> None:
    """Project in all layers by bases [layers, 2, KV heads, d, d] cut at ranks [layers, 2, KV heads], or by none."""
    if bases is None or ranks is None:
        for projector in projectors:
            projector.key = projector.value = None
        return
    kept = torch.arange(bases.shape[-1], device=bases.device) < ranks.to(bases.device)[..., None]
    set_projections(projectors, cut_projections(bases, kept))
