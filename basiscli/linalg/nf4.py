"""NF4, the 4-bit format of QLoRA: rounding of weights, and adapter initialisation that absorbs its error."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 64  # consecutive elements that share one absmax
_CHUNK = BLOCK << 12  # elements at a time: 1 MiB of float32, so that what lies between fits a cache
_LEAST = 1e-38  # an absmax below it counts as it: its reciprocal would be infinite

# QLoRA, appendix E: quantiles of the normal distribution over the outermost: 7 below zero, zero, 8 above.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

Start = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From a matrix [m, n] to (B [m, r], A [r, n]), the part of it that moves into an adapter."""


def nf4_rounded(weight: Tensor) -> Tensor:
    """Return a weight quantised to NF4 and dequantised, as a 4-bit load computes with it.

    Source: Dettmers et al. 2023, arXiv 2305.14314, appendix E.

    As bitsandbytes does it, bit for bit, without double quantisation: 64 consecutive elements of the row-major weight,
    across rows if need be, share their largest magnitude as float32; divided by it, each goes to the nearest of the 16
    levels, from the middle of two to the lower. The last block may be shorter.

    The result is its own rounding, bit for bit: zero and the largest magnitude are levels (from 1e-38 on). Stored in
    bfloat16 it keeps every code: the nearest border is 10 % away and rounding moves 0.8 %; its last bits may differ
    once more. The *weight* stored in bfloat16 does not keep its codes, as some elements lie at a border: what a load
    computes with is the rounding of the tensor as stored, in its dtype.

    Memory: the result and a few MiB; a weight that is not contiguous is copied.

    Args:
        weight: any shape and floating dtype, finite. What is wider than float32 is rounded to it first.

    Returns:
        The same shape and dtype, contiguous.
    """
    flat = weight.reshape(-1)
    result = torch.empty_like(flat)
    whole = flat.numel() - flat.numel() % BLOCK
    for first in range(0, whole, _CHUNK):
        chunk = slice(first, min(first + _CHUNK, whole))
        result[chunk] = _nearest_levels(flat[chunk].view(-1, BLOCK)).view(-1)
    if whole < flat.numel():
        result[whole:] = _nearest_levels(flat[whole:][None])[0]
    return result.view(weight.shape)


def _nearest_levels(blocks: Tensor) -> Tensor:
    """Round each row of [blocks, elements] relative to its own absmax; float32."""
    blocks = blocks.float()
    levels = torch.tensor(LEVELS, device=blocks.device)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    scaled = blocks * absmax.clamp_min(_LEAST).reciprocal()  # a division would round otherwise than bitsandbytes
    borders = (levels[:-1] + levels[1:]) / 2
    return levels[torch.bucketize(scaled, borders, out_int32=True)] * absmax


def quantised_start(weight: Tensor, start: Start, *, rounds: int) -> tuple[Tensor, Tensor]:
    """Return B, A of an adapter whose base W − BA will be loaded in NF4 (QPiSSA: Meng et al., arXiv 2404.02948).

    The first round is start(W). Each further round adds what the quantised base lacks of W:

        (B, A) = start(W − nf4(W − B A))

    For principal singular vectors that is the principal part of W again, with the largest part of what NF4 rounds
    away: the error ‖W − nf4(W − BA) − BA‖ falls from round to round. A start that takes a minor part (milora) must
    have one round only: there is nothing minor left in the second but the rounding's noise, which it would take.

    Scaling and storage are the caller's: what they round moves into W − BA and is quantised with it.

    Args:
        weight: W [m, n], float32.
        start: returns (B, A) for a matrix, such as its principal singular vectors; called once a round.
        rounds: T, at least 1; the paper takes 5.

    Returns:
        B [m, r] and A [r, n] of the last round.
    """
    b, a = start(weight)
    for _ in range(rounds - 1):
        b, a = start(weight - nf4_rounded(weight - b @ a))
    return b, a
