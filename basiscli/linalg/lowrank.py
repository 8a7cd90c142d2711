"""Low-rank matrices as a product of two factors, as in LoRA, with sums, norms and SVD that never form the product."""

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
    """The tensor `(b @ a).reshape(shape)`, with b [m, k] and a [k, n].

        update = LowRank(lora_b * scaling, lora_a, weight.shape)
        (update + other).svd()  # of rank k + other's k, in O((m + n) k²)

    `shape` differs from (m, n) for convolutions only, whose kernel dimensions are flattened into n.
    """

    b: Tensor
    a: Tensor
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        """The inner dimension k, which the matrix's rank is at most."""
        return self.b.shape[1]

    def dense(self, rows: slice | None = None) -> Tensor:
        """Return the dense tensor of `shape`, or a slice of its first dimension."""
        b = self.b if rows is None else self.b[rows]
        return (b @ self.a).reshape(b.shape[0], *self.shape[1:])

    def scaled(self, factor: float) -> LowRank:
        """Return the tensor times a factor, in the same form."""
        return LowRank(self.b * factor, self.a, self.shape)

    def to(self, device: torch.device | str) -> LowRank:
        """Return the tensor with both factors on a device."""
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
        """Return the thin SVD U [m, k], σ [k], Vᵀ [k, n] in float64, without forming the product.

        Two thin QR decompositions and the SVD of a k×k core. Singular values at rounding level are left out.
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

    For two `LowRank` it costs O((m + n)·k²); dense tensors are multiplied in blocks.
    """
    if isinstance(x, LowRank) and isinstance(y, LowRank):
        core = (x.b.double().mT @ y.b.double()) * (x.a.double() @ y.a.double().mT)
        return float(core.sum())
    dense = [t.dense() if isinstance(t, LowRank) else t for t in (x, y)]
    return (
        float(gram([t.reshape(-1) for t in dense])[0, 1]) if x is not y else float(gram([dense[0].reshape(-1)])[0, 0])
    )


def gram(vectors: list[Tensor], block: int = 1 << 16, *, origin: Tensor | None = None) -> Tensor:
    """Return the inner products of k flat vectors, or of their differences from an origin, as float64 [k, k].

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
