"""Attention over the coefficients of heads that keep the same number of dimensions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

_SMALL_QUERY = 8  # up to so many query tokens, two plain products beat the attention kernels


@dataclass(frozen=True)
class Bucket:
    """KV heads of one layer that keep the same number of dimensions."""

    heads: slice | list[int]
    count: int
    key_rank: int
    value_rank: int
    keys: slice
    """Where their coefficients lie in the packed keys."""
    values: slice


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dropout: float = 0.0
) -> Tensor:
    """Attention [B, T, Hq, d] of queries [B, Hq, T, d] over whole keys and values [B, H, S, d]."""
    out = grouped_attention(query.unflatten(1, (key.shape[1], -1)), key, value, mask, scale, dropout)
    return out.flatten(1, 2).transpose(1, 2)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float) -> Tensor:
    """Return [B, H, G, T, r_V] of grouped queries [B, H, G, T, r] over keys [B, H, S, r] and values [B, H, S, r_V]."""
    _, heads, group, tokens, rank = q.shape
    length = k.shape[2]
    if tokens == 1 or (tokens <= _SMALL_QUERY and mask is not None and not dropout):
        scores = (q.flatten(2, 3) * scale) @ k.mT
        if mask is not None:
            scores = scores.unflatten(2, (group, tokens))
            mask = mask[:, :, None]  # one mask for all heads of all groups
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
            scores = scores.flatten(2, 3)
        # A row that sees nothing (padding) is all −∞: its softmax is NaN and would spread.
        weights = scores.softmax(-1, dtype=torch.float32)
        weights = (weights if mask is None else weights.nan_to_num()).to(v.dtype)
        seen: Tensor = (weights @ v).unflatten(2, (group, tokens))
        return seen
    # The fast kernels want keys and values equally wide: zeros change neither the products nor what is read back.
    wide = max(rank, v.shape[-1])
    causal = mask is None and tokens > 1
    if causal and length > tokens:  # an empty static cache: its unused places follow the text
        k, v = k[:, :, :tokens], v[:, :, :tokens]
    out = scaled_dot_product_attention(
        pad(q, (0, wide - rank)).flatten(1, 2),
        _repeated(pad(k, (0, wide - rank)), group),
        _repeated(pad(v, (0, wide - v.shape[-1])), group),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scale,
    )
    attended: Tensor = out[..., : v.shape[-1]].unflatten(1, (heads, group))
    return attended


def _repeated(x: Tensor, group: int) -> Tensor:
    return x if group == 1 else x[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2)


def buckets_of(key_ranks: tuple[int, ...], value_ranks: tuple[int, ...]) -> tuple[Bucket, ...]:
    """Return the heads of a layer in buckets of equal ranks, the largest first, from the ranks of every head."""
    together_with: dict[tuple[int, int], list[int]] = {}
    for head, pair in enumerate(zip(key_ranks, value_ranks, strict=True)):
        together_with.setdefault(pair, []).append(head)
    pairs = sorted(together_with, reverse=True)
    key_ends = accumulate(len(together_with[pair]) * pair[0] for pair in pairs)
    value_ends = accumulate(len(together_with[pair]) * pair[1] for pair in pairs)
    found = []
    for pair, key_end, value_end in zip(pairs, key_ends, value_ends, strict=True):
        heads = together_with[pair]
        together = heads == list(range(heads[0], heads[-1] + 1))
        found.append(
            Bucket(
                slice(heads[0], heads[-1] + 1) if together else heads,
                len(heads),
                *pair,
                slice(key_end - len(heads) * pair[0], key_end),
                slice(value_end - len(heads) * pair[1], value_end),
            )
        )
    return tuple(found)


def heads_of(bucket: Bucket, total: int) -> Iterator[int]:
    """Yield the numbers of a bucket's heads, of so many in the layer."""
    return iter(range(total)[bucket.heads] if isinstance(bucket.heads, slice) else bucket.heads)
