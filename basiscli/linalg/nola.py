"""NOLA: the factors of a low-rank update as combinations of random matrices (arXiv 2310.02556).

    ΔW = (α/r) B A,   A = Σ aᵢ Aᵢ [r, in],   B = Σ bⱼ Bⱼ [out, r]

The elements of Aᵢ and Bⱼ are U(−1, 1)·√(3/fan)/√k with fan = in for A and r for B, so that coefficients of variance 1
make entries of variance 1/fan. Each factor of each module has its own random stream, keyed by the seed and the module.
"""

from __future__ import annotations

import math

from torch import Tensor

from basiscli.linalg.randbasis import RandomBases, stream_key, uniform


def seed_name(module: str) -> str:
    """Return the part of a module's name that is the same however its model is loaded; it keys the random stream.

    `model.layers.0.mlp.up_proj` is `layers.0.mlp.up_proj` in the class without a head, and longer in a vision-language
    model. The result begins at the list of layers, or at `encoder` or `decoder` before it. Two stacks of one model may
    so share bases; their coefficients are their own.
    """
    parts = module.split(".")
    layer = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
    if layer is None:
        return ".".join(parts[-2:])
    start = max(0, layer - 1)
    if start and parts[start - 1] in ("encoder", "decoder"):
        start -= 1
    return ".".join(parts[start:])


def factor_bases(
    seed: int, module: str, *, rank: int, count: int, in_features: int, out_features: int
) -> tuple[RandomBases, RandomBases]:
    """Return the random bases of A [rank, in] and of B [out, rank], `count` each but never more than elements."""

    def bases(factor: str, shape: tuple[int, int]) -> RandomBases:
        own = min(count, math.prod(shape))
        return RandomBases(stream_key(seed, seed_name(module), factor), own, shape, math.sqrt(3 / shape[1] / own))

    return bases("A", (rank, in_features)), bases("B", (out_features, rank))


def start_of(bases: RandomBases) -> Tensor:
    """Return initial coefficients of variance 1, float32 [count], from a random stream keyed by the bases."""
    return uniform(stream_key(bases.key, "start"), 0, bases.count) * math.sqrt(3)
