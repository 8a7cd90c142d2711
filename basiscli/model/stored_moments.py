"""Second moments of a layer's inputs, kept in blocks of rows that tasks add to.

Of the symmetric matrix [in, in] a block is some rows, from the diagonal to the right. Blocks do not touch each other:
each is summed over the text in its order by whoever has the time, and of a wide matrix none is more than an eighth.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from basiscli.engine.tensor_store import TensorStore
from basiscli.transforms import InputMoments

_ROWS = 2048  # rows whose products are summed in float32 before they join the float64 sum
_BAND = 512  # rows of a block that are added to at once: their product is all the memory that adding takes
_MOST_BLOCKS = 8  # at most; the task of each reads all inputs


@dataclass(frozen=True)
class StoredMoments:
    """Moments of one input, in blocks of rows."""

    store: TensorStore
    module: str
    """The first that reads it."""
    width: int
    count: int
    """Tokens."""

    def load(self, device: torch.device) -> InputMoments:
        """Assemble the whole symmetric matrix [in, in] on a device."""
        second = torch.zeros(self.width, self.width, dtype=torch.float64, device=device)
        total, shift = torch.zeros_like(second[0]), torch.zeros_like(second[0])
        for block in moment_blocks(self.width) if self.count else ():
            part = self.store.get(block_key(self.module, block))
            second[block, block.start :] = part["second"].to(device)
            total[block] = part["total"].to(device)
            shift[block.start :] = part["shift"].to(device)
        for band in _bands(self.width):
            second[band.stop :, band] = second[band, band.stop :].mT
        return InputMoments(self.count, shift, total, second)

    def drop(self) -> None:
        """Forget them."""
        for block in moment_blocks(self.width):
            self.store.drop(block_key(self.module, block))


def moment_blocks(width: int) -> list[slice]:
    """Return the rows of each block."""
    height = -(-width // (_MOST_BLOCKS * _BAND)) * _BAND
    return [slice(first, min(first + height, width)) for first in range(0, width, height)]


def block_key(module: str, block: slice) -> str:
    """Return what a block is kept under."""
    return f"{module}-{block.start}"


def block_bytes(block: slice, width: int) -> int:
    """Return the memory that adding to a block takes, as it is and as it will be."""
    height: int = block.stop - block.start
    return (16 * height + 4 * _BAND + 8 * _ROWS) * width


def empty_sums(block: slice, mean: Tensor) -> dict[str, Tensor]:
    """Return a block without rows, about a point [in] near their mean, which so takes no digits from them."""
    height, shift = block.stop - block.start, mean[block.start :]
    second = torch.zeros(height, len(shift), dtype=torch.float64, device=mean.device)
    return {"shift": shift, "total": torch.zeros_like(second[:, 0]), "second": second}


def add_rows(sums: dict[str, Tensor], block: slice, rows: Tensor) -> None:
    """Add rows [n, in] to a block."""
    for part in rows[:, block.start :].split(_ROWS):
        moved = part.float() - sums["shift"]
        sums["total"] += moved[:, : len(sums["total"])].sum(0, dtype=torch.float64)
        for band in _bands(len(sums["total"])):
            sums["second"][band, band.start :] += moved[:, band].mT @ moved[:, band.start :]


def _bands(height: int) -> Iterator[slice]:
    for first in range(0, height, _BAND):
        yield slice(first, min(first + _BAND, height))
