"""Storage of NOLA coefficients: float16, or 8-bit or 4-bit codes with a scale per block."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 64
"""Coefficients per scale."""
_MOST = {8: 127, 4: 7}


def stored_form(count: int, bits: int) -> tuple[str, tuple[int]]:
    """Return (dtype, shape) of `count` stored coefficients: float16, or below 16 bits the bytes of `packed`."""
    if bits == 16:
        return "F16", (count,)
    codes = count if bits == 8 or count == 1 else -(-count // 2)
    return "U8", (2 * -(-count // BLOCK) + codes,)


def packed(coefficients: Tensor, bits: int) -> Tensor:
    """Return coefficients [k] as uint8: a bfloat16 scale per 64 of them, then codes of 8 or 4 bits.

    A code is a signed integer times its block's scale, the block's largest magnitude over 127 or 7; 4-bit codes are
    stored plus 8, the first of a pair in the low half. A single coefficient takes 8 bits either way.
    """
    import torch

    count = len(coefficients)
    most = _MOST[8 if count == 1 else bits]
    blocks = torch.nn.functional.pad(coefficients.float(), (0, -count % BLOCK)).view(-1, BLOCK)
    scales = (blocks.abs().amax(1) / most).bfloat16()
    # Rounded scales decide the codes: what is read back is then the nearest that can be.
    steps = scales.float()[:, None].clamp_min(torch.finfo(torch.bfloat16).tiny)
    codes = (blocks / steps).round().clamp(-most, most).to(torch.int8).flatten()[:count]
    if most == _MOST[4]:
        halves = torch.nn.functional.pad(codes + 8, (0, count % 2)).view(torch.uint8).view(-1, 2)
        codes = (halves[:, 0] | halves[:, 1] << 4).view(torch.int8)
    return torch.cat([scales.view(torch.uint8), codes.view(torch.uint8)])


def rounding_variance(bits: int) -> float:
    """Return the variance of the error that storage adds to coefficients of variance 1.

    Of 64 normal numbers the largest is near 2.4, which gives the step of a code. At 16 bits it is the error of float32
    sums over many bases, which is larger than that of rounding to float16.
    """
    return 1e-6 if bits == 16 else (2.4 / _MOST[bits]) ** 2 / 12


def unpacked(stored: Tensor, count: int) -> Tensor:
    """Return stored coefficients, float16 or the bytes of `packed`, as float32 [count].

    Raises:
        ValueError: they are not `count`.
    """
    import torch

    if stored.dtype != torch.uint8:
        if stored.shape != (count,):
            raise ValueError(f"{list(stored.shape)} coefficients, not {count}")
        return stored.float()
    blocks = -(-count // BLOCK)
    scales, codes = stored[: 2 * blocks], stored[2 * blocks :]
    if stored.dim() != 1 or len(codes) not in (count, -(-count // 2)):
        raise ValueError(f"{list(stored.shape)} bytes do not hold {count} coefficients")
    signed = codes.view(torch.int8)
    if len(codes) < count:
        signed = (torch.stack([codes & 15, codes >> 4], 1).flatten()[:count].to(torch.int8)) - 8
    each = scales.clone().view(torch.bfloat16).float().repeat_interleave(BLOCK)[:count]
    return signed.float() * each
