"""Matrices kept as a product of two thin factors, as a LoRA adapter is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

_BLOCKS_TOGETHER = {"cuda": 64}
"""Blocks of vectors that are multiplied at once: one stays in a CPU's cache, a GPU needs many to be worth a launch."""


@dataclass(frozen=True)
class LowRank:
    """The tensor `(b @ a).reshape(shape)`; b is (m, k) and a is (k, n).

    `shape` differs from (m, n) for convolutions only, whose kernel dimensions are flattened into n.
    """

    b: Tensor
    a: Tensor
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        """The inner dimension k, an upper bound of the rank."""
        return self.b.shape[1]

    def dense(self, rows: slice | None = None) -> Tensor:
        """Return the tensor itself, or rows of its first dimension."""
        b = self.b if rows is None else self.b[rows]
        return (b @ self.a).reshape(b.shape[0], *self.shape[1:])

    def scaled(self, factor: float) -> LowRank:
        """Return the tensor times a number."""
        return LowRank(self.b * factor, self.a, self.shape)

    def to(self, device: torch.device | str) -> LowRank:
        """Return the tensor on a device."""
        return LowRank(self.b.to(device), self.a.to(device), self.shape)

    @overload
    def __add__(self, other: LowRank) -> LowRank: ...
    @overload
    def __add__(self, other: Tensor) -> Tensor: ...
    def __add__(self, other: LowRank | Tensor) -> LowRank | Tensor:
        if isinstance(other, Tensor):
            return self.dense() + other
        return LowRank(torch.cat([self.b, other.b], 1), torch.cat([self.a, other.a], 0), self.shape)

    def __radd__(self, other: Tensor) -> Tensor:
        return other + self.dense()

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the thin SVD (u, sigma, vh) in float64 without forming the product.

        Two thin QR decompositions and the SVD of a k×k core. Directions that are rounding noise are left out.
        """
        q_b, r_b = torch.linalg.qr(self.b.double())
        q_a, r_a = torch.linalg.qr(self.a.double().mT)
        u, sigma, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
        # The factors come from float32 or coarser storage; anything below its resolution is no direction.
        floor = torch.finfo(torch.float32).eps * float(sigma[0]) if sigma.numel() else 0.0
        keep = int((sigma > floor).sum())
        return q_b @ u[:, :keep], sigma[:keep], vh[:keep] @ q_a.mT


def inner(x: Tensor | LowRank, y: Tensor | LowRank) -> float:
    """Return the Frobenius inner product ⟨x, y⟩, accumulated in float64.

    Two products of factors cost O((m + n)·k²); a dense tensor is taken in blocks.
    """
    if isinstance(x, LowRank) and isinstance(y, LowRank):
        core = (x.b.double().mT @ y.b.double()) * (x.a.double() @ y.a.double().mT)
        return float(core.sum())
    dense = [t.dense() if isinstance(t, LowRank) else t for t in (x, y)]
    return (
        float(gram([t.reshape(-1) for t in dense])[0, 1]) if x is not y else float(gram([dense[0].reshape(-1)])[0, 0])
    )


def gram(vectors: list[Tensor], block: int = 1 << 16, *, origin: Tensor | None = None) -> Tensor:
    """Return the k×k matrix of inner products of k flat vectors (of their differences from an origin), in float64.

    Products are taken in the vectors' own dtype a block at a time and the blocks summed in float64: as fast as float32,
    with an error that does not grow with the length.
    """
    length = vectors[0].numel()
    total = torch.zeros(len(vectors), len(vectors), dtype=torch.float64, device=vectors[0].device)
    together, begin = _BLOCKS_TOGETHER.get(vectors[0].device.type, 1), 0
    while begin < length:
        count = min(together, max(1, (length - begin) // block))
        end = min(begin + count * block, length)
        part = torch.stack([v[begin:end].reshape(count, -1) for v in vectors], 1)
        if origin is not None:
            part -= origin[begin:end].reshape(count, 1, -1)
        products = part @ part.mT if count > 1 else (part[0] @ part[0].mT)[None]
        total += products.sum(0, dtype=torch.float64)
        begin = end
    return total


def norm(x: Tensor | LowRank) -> float:
    """Return the Frobenius norm, accumulated in float64."""
    return math.sqrt(max(inner(x, x), 0.0))
