"""Random matrices made from a seed, with the same bits on every device and with every version of torch.

torch's generators promise neither, so the numbers come from Philox-4x32-10 (Salmon et al., 'Parallel random numbers: as
easy as 1, 2, 3', SC 2011), a function of a key and a counter: any part of a stream is made on its own, in any order.
It runs in integer tensor operations that every device has. A 32-bit factor times another is one int64 product: it
wraps where an unsigned one would, its low half is the low word, and after an arithmetic shift and a mask its high half
is the high word.

A value takes 16 bits: U(−1, 1) stands here for the 65,536 values (2s + 1)/2¹⁶ with s a signed 16-bit integer, symmetric
about zero, of variance (1 − 2⁻³²)/3, exact in float32. A sum of many bases does not tell them from a finer grid, and
they cost half as many operations as values of 24 bits would.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_LANES = 8  # values that one counter gives
# Counters worked on at a time: buffers that stay in a core's cache, or that keep an accelerator busy.
_CPU_BLOCK, _DEVICE_BLOCK = 1 << 15, 1 << 19
_VALUES = 1 << 18  # of bases that are there at a time: 1 MiB


def stream_key(*parts: object) -> int:
    """Return a 64-bit key of a random stream, a hash of strings and numbers such as a seed and a module's name."""
    words = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "little")


def philox4x32(words: Tensor, key: int) -> Tensor:
    """Return the random words of Philox-4x32-10 for counters.

    Args:
        words: the counters' four 32-bit words, lowest first, int64 [4, n]; overwritten.
        key: 64 bits, of which the low half is the first word.

    Returns:
        int64 [4, n], each at least 0 and less than 2³².
    """
    x0, x1, x2, x3 = words
    x0, x1, x2, x3 = _philox(x0, x1, x2, x3, torch.empty_like(words[:2]), key)
    return torch.stack([x0, x1 & _WORD, x2, x3 & _WORD])


def _philox(x0: Tensor, x1: Tensor, x2: Tensor, x3: Tensor, spare: Tensor, key: int) -> tuple[Tensor, ...]:
    """Work in place with two spare buffers; the odd words come back with more than 32 bits, of which the low count."""
    spare0, spare1 = spare
    key0, key1 = key & _WORD, key >> 32
    for _ in range(_ROUNDS):
        torch.mul(x0, _MULTIPLIERS[0], out=spare0)
        torch.mul(x2, _MULTIPLIERS[1], out=spare1)
        # The even words are factors of the next products and must be exact; what is left above the odd ones' 32 bits
        # only ever meets a mask.
        torch.bitwise_right_shift(spare1, 32, out=x0).bitwise_xor_(x1).bitwise_xor_(key0).bitwise_and_(_WORD)
        torch.bitwise_right_shift(spare0, 32, out=x2).bitwise_xor_(x3).bitwise_xor_(key1).bitwise_and_(_WORD)
        x1, x3, spare0, spare1 = spare1, spare0, x3, x1
        key0, key1 = key0 + _WEYL[0] & _WORD, key1 + _WEYL[1] & _WORD
    return x0, x1, x2, x3


def uniform(key: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Return values `start` to `start + count − 1` of a key's stream of U(−1, 1), float32 [count].

    Counter c gives values 8c … 8c + 7: the low and then the high half of each word in turn.
    """
    first, last = start // _LANES, -(-(start + count) // _LANES)
    device = torch.device(device)
    block = _CPU_BLOCK * torch.get_num_threads() if device.type == "cpu" else _DEVICE_BLOCK
    block = max(1, min(block, last - first))
    words = torch.empty((6, block), dtype=torch.int64, device=device)
    packed = torch.empty((block, 2), dtype=torch.int64, device=device)
    values = torch.empty((last - first) * _LANES, dtype=torch.float32, device=device)
    for begin in range(first, last, block):
        n = min(block, last - begin)
        x0, x1, x2, x3 = words[:4, :n]
        torch.arange(begin, begin + n, out=x0)
        torch.bitwise_right_shift(x0, 32, out=x1)
        x0 &= _WORD
        x2.zero_()
        x3.zero_()
        x0, x1, x2, x3 = _philox(x0, x1, x2, x3, words[4:, :n], key)
        torch.bitwise_or(x1.bitwise_left_shift_(32), x0, out=packed[:n, 0])
        torch.bitwise_or(x3.bitwise_left_shift_(32), x2, out=packed[:n, 1])
        place = (begin - first) * _LANES
        values[place : place + n * _LANES] = packed[:n].view(torch.int16).flatten()
    values.mul_(2**-15).add_(2**-16)
    return values[start - first * _LANES :][:count]


@dataclass(frozen=True)
class RandomBases:
    """`count` fixed random matrices of one shape, generated from a key.

        bases = RandomBases(stream_key(seed, module, "A"), count=256, shape=(rank, in_features), bound=0.1)
        a = bases.combination(coefficients)  # Σ cᵢ Bᵢ, [rank, in_features]
        gradient = bases.projections(grad_a)  # of the loss by the coefficients, [256]

    They are made again whenever they are needed, a few at a time, and never stored.
    """

    key: int
    count: int
    shape: tuple[int, int]
    bound: float
    """Elements are U(−bound, bound)."""

    def rows(self, indices: slice, device: torch.device | str = "cpu") -> Tensor:
        """Return a slice of the matrices divided by `bound`, one per row: float32 [n, elements]."""
        first, last, _ = indices.indices(self.count)
        size = prod(self.shape)
        return uniform(self.key, first * size, (last - first) * size, device).view(-1, size)

    def combination(self, coefficients: Tensor) -> Tensor:
        """Return Σ cᵢ Bᵢ, float32 of the bases' shape, for coefficients [count]."""
        weights = coefficients.detach().float() * self.bound
        total = torch.zeros(prod(self.shape), device=weights.device)
        for places in self._blocks():
            total += weights[places] @ self.rows(places, weights.device)
        return total.view(self.shape)

    def projections(self, matrix: Tensor) -> Tensor:
        """Return ⟨Bᵢ, matrix⟩ for every i, float32 [count]: the gradient of `combination` by its coefficients."""
        flat = matrix.detach().float().flatten()
        found = torch.empty(self.count, device=flat.device)
        for places in self._blocks():
            torch.mv(self.rows(places, flat.device), flat, out=found[places])
        return found.mul_(self.bound)

    def _blocks(self) -> Iterator[slice]:
        """Yield slices of bases that are made together; the same everywhere, as the order of sums is their rounding."""
        step = max(1, _VALUES // prod(self.shape))
        for begin in range(0, self.count, step):
            yield slice(begin, min(begin + step, self.count))
