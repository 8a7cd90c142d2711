"""Second moments of a layer's inputs, stored in row blocks that tasks add to.

A block is some rows of the symmetric matrix [in, in], from the diagonal to the right. Blocks are independent of each
other: each is summed over the text in order by any worker, and a wide matrix has eight of them.
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
    """Moments of one input, in row blocks in a tensor store."""

    store: TensorStore
    module: str
    """Name of the first module that reads the input."""
    width: int
    """Features of the input."""
    count: int
    """Tokens that are summed."""

    def load(self, device: torch.device) -> InputMoments:
        """Return the moments with the whole symmetric matrix, float64 [in, in], on a device."""
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
        """Remove the blocks from the store."""
        for block in moment_blocks(self.width):
            self.store.drop(block_key(self.module, block))


def moment_blocks(width: int) -> list[slice]:
    """Return the row slices of the blocks of a matrix [width, width]."""
    height = -(-width // (_MOST_BLOCKS * _BAND)) * _BAND
    return [slice(first, min(first + height, width)) for first in range(0, width, height)]


def block_key(module: str, block: slice) -> str:
    """Return the key of a block in the tensor store."""
    return f"{module}-{block.start}"


def block_bytes(block: slice, width: int) -> int:
    """Return the bytes of memory that `add_rows` to a block takes, the block before and after included."""
    height: int = block.stop - block.start
    return (16 * height + 4 * _BAND + 8 * _ROWS) * width


def empty_sums(block: slice, mean: Tensor) -> dict[str, Tensor]:
    """Return a block of zero sums, taken about a point [in] near the rows' mean so that the mean costs no digits.

    Returns:
        `shift` [in − start], `total` [rows] and `second` [rows, in − start], float64 but for the shift.
    """
    height, shift = block.stop - block.start, mean[block.start :]
    second = torch.zeros(height, len(shift), dtype=torch.float64, device=mean.device)
    return {"shift": shift, "total": torch.zeros_like(second[:, 0]), "second": second}


def add_rows(sums: dict[str, Tensor], block: slice, rows: Tensor) -> None:
    """Add inputs [n, in] to the sums of a block, in place."""
    for part in rows[:, block.start :].split(_ROWS):
        moved = part.float() - sums["shift"]
        sums["total"] += moved[:, : len(sums["total"])].sum(0, dtype=torch.float64)
        for band in _bands(len(sums["total"])):
            sums["second"][band, band.start :] += moved[:, band].mT @ moved[:, band.start :]


def _bands(height: int) -> Iterator[slice]:
    for first in range(0, height, _BAND):
        yield slice(first, min(first + _BAND, height))
