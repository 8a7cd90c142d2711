"""NOLA: the factors of a low-rank update as combinations of random matrices (arXiv 2310.02556).

    ΔW = (α/r) B A,   A = Σ aᵢ Aᵢ [r, in],   B = Σ bⱼ Bⱼ [out, r]

The elements of Aᵢ and Bⱼ are U(−1, 1)·√(3/fan)/√k with fan = in for A and r for B, so that coefficients of variance 1
make entries of variance 1/fan. Each factor of each module has a stream of its own, named by the seed and the module.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from basiscli.linalg.randbasis import RandomBases, stream_key, uniform

_BLOCK = 64  # coefficients that share a scale
_MOST = {8: 127, 4: 7}


def seed_name(module: str) -> str:
    """Return the part of a module's name that every way of loading its model agrees on.

    `model.layers.0.mlp.up_proj` is `layers.0.mlp.up_proj` to the class without a head, and longer inside a model that
    also sees: what counts begins with the list of layers, and with `encoder` or `decoder` where that stands before it.
    Two stacks of one model may share bases so; their coefficients are their own.
    """
    parts = module.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
    if number is None:
        return ".".join(parts[-2:])
    start = max(0, number - 1)
    if start and parts[start - 1] in ("encoder", "decoder"):
        start -= 1
    return ".".join(parts[start:])


def factor_bases(
    seed: int, module: str, *, rank: int, count: int, in_features: int, out_features: int
) -> tuple[RandomBases, RandomBases]:
    """Return the bases of A and of B; no more of a factor's than it has elements, which would be of no use."""

    def bases(factor: str, shape: tuple[int, int]) -> RandomBases:
        own = min(count, math.prod(shape))
        return RandomBases(stream_key(seed, seed_name(module), factor), own, shape, math.sqrt(3 / shape[1] / own))

    return bases("A", (rank, in_features)), bases("B", (out_features, rank))


def start_of(bases: RandomBases) -> Tensor:
    """Return coefficients of variance 1 to begin with, float32 [count], from a stream that the bases' key names."""
    return uniform(stream_key(bases.key, "start"), 0, bases.count) * math.sqrt(3)


def packed(coefficients: Tensor, bits: int) -> Tensor:
    """Return coefficients [k] as bytes: a bfloat16 scale for every 64 of them, then codes of 8 or 4 bits.

    A code is a signed integer times its block's scale, the block's largest magnitude over 127 or 7; 4-bit codes are
    stored plus 8, the first of a pair in the low half. A single coefficient takes 8 bits either way.
    """
    count = len(coefficients)
    most = _MOST[8 if count == 1 else bits]
    blocks = torch.nn.functional.pad(coefficients.float(), (0, -count % _BLOCK)).view(-1, _BLOCK)
    scales = (blocks.abs().amax(1) / most).bfloat16()
    # Rounded scales decide the codes: what is read back is then the nearest that can be.
    steps = scales.float()[:, None].clamp_min(torch.finfo(torch.bfloat16).tiny)
    codes = (blocks / steps).round().clamp(-most, most).to(torch.int8).flatten()[:count]
    if most == _MOST[4]:
        halves = torch.nn.functional.pad(codes + 8, (0, count % 2)).view(torch.uint8).view(-1, 2)
        codes = (halves[:, 0] | halves[:, 1] << 4).view(torch.int8)
    return torch.cat([scales.view(torch.uint8), codes.view(torch.uint8)])


def rounding_variance(bits: int) -> float:
    """Return the variance that `packed` adds to coefficients of variance 1: of 64 normal ones the largest is near 2.4.

    At 16 bits it is that of float32's sums of many bases, which is more than rounding to float16 takes.
    """
    return 1e-6 if bits == 16 else (2.4 / _MOST[bits]) ** 2 / 12


def unpacked(stored: Tensor, count: int) -> Tensor:
    """Return the coefficients that a file holds, float32 [count]: numbers, or bytes that `packed` made.

    Raises:
        ValueError: their number is another.
    """
    if stored.dtype != torch.uint8:
        if stored.shape != (count,):
            raise ValueError(f"{list(stored.shape)} coefficients, not {count}")
        return stored.float()
    blocks = -(-count // _BLOCK)
    scales, codes = stored[: 2 * blocks], stored[2 * blocks :]
    if stored.dim() != 1 or len(codes) not in (count, -(-count // 2)):
        raise ValueError(f"{list(stored.shape)} bytes do not hold {count} coefficients")
    signed = codes.view(torch.int8)
    if len(codes) < count:
        signed = (torch.stack([codes & 15, codes >> 4], 1).flatten()[:count].to(torch.int8)) - 8
    each = scales.clone().view(torch.bfloat16).float().repeat_interleave(_BLOCK)[:count]
    return signed.float() * each
