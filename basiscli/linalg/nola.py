"""NOLA: the factors of a low-rank update as combinations of random matrices (arXiv 2310.02556).

    ΔW = (α/r) B A,   A = Σ aᵢ Aᵢ [r, in],   B = Σ bⱼ Bⱼ [out, r]

The elements of Aᵢ and Bⱼ are U(−1, 1)·√(3/fan)/√k with fan = in for A and r for B, so that coefficients of variance 1
make entries of variance 1/fan. Each factor of each module has a stream of its own, named by the seed and the module.
"""

from __future__ import annotations

import math

from torch import Tensor

from basiscli.linalg.randbasis import RandomBases, stream_key, uniform


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
