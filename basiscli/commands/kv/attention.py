"""Attention functions put into a model while its bases are found: second moments, and projections with a gradient."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from basiscli.runtime.kv_heads import plain_attention


class AttentionMomentSums(nn.Module):
    """Dense attention that sums second moments of its queries, keys and values.

    `keys` and `values` are float64 sums of kᵀk and vᵀv [KV heads, d, d]; `queries` is the same of the queries, summed
    over the group of heads that shares a KV head. The products are float32, a forward's at a time.

    Threads may run the model at the same time: each has its own sums.
    """

    def __init__(self) -> None:
        super().__init__()
        self._here = threading.local()

    @property
    def sums(self) -> dict[str, Tensor]:
        """This thread's sums by name, each float64 [KV heads, d, d] on the CPU."""
        found: dict[str, Tensor] = self._here.sums
        return found

    def begin(self) -> None:
        """Reset this thread's sums."""
        self._here.sums = {}

    def set_mask(self, mask: Tensor | None) -> None:
        """Set which tokens of this thread's next forward are summed, [batch, tokens] of 0 and 1; None for all."""
        self._here.counted = mask

    def forward(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        """Return attention over query [B, heads, T, d] and key, value [B, KV heads, T, d], and add to the sums."""
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
        """P_K; None for dense keys."""
        self.value: Tensor | None = None
        """P_V; None for dense values."""

    def forward(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        """Return attention over query [B, heads, T, d] and the projected key, value [B, KV heads, T, d]."""
        if self.key is not None and self.value is not None:
            key, value = key @ self.key.to(key.dtype), value @ self.value.to(value.dtype)
        return plain_attention(query, key, value, *rest)


def cut_projections(bases: Tensor, strength: Tensor) -> Tensor:
    """Return projections U diag(s) Uᵀ [..., d, d] for bases U and column weights s [..., d], 1 for a kept column."""
    return (bases * strength[..., None, :].to(bases.dtype)) @ bases.mT


def set_projections(projectors: Sequence[Projector], projections: Tensor) -> None:
    """Set the projections of all layers: [layers, 2 (keys, values), KV heads, d, d]."""
    for projector, (key, value) in zip(projectors, projections, strict=True):
        projector.key, projector.value = key, value


def set_bases(projectors: Sequence[Projector], bases: Tensor | None, ranks: Tensor | None = None) -> None:
    """Set projections by bases [layers, 2, KV heads, d, d] cut at ranks [layers, 2, KV heads]; None for none."""
    if bases is None or ranks is None:
        for projector in projectors:
            projector.key = projector.value = None
        return
    kept = torch.arange(bases.shape[-1], device=bases.device) < ranks.to(bases.device)[..., None]
    set_projections(projectors, cut_projections(bases, kept))
