"""Second moments of a layer's inputs, in strips: what tasks add to and leave for others.

Of the symmetric matrix [in, in] a strip is some rows, from the diagonal to the right. Strips do not touch each other:
each is summed over the text in its order by whoever has the time, and of a wide matrix none is more than an eighth.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from basiscli.engine.tensor_store import Exchange
from basiscli.transforms import InputMoments

_ROWS = 2048  # rows whose products are summed in float32 before they join the float64 sum
_BAND = 512  # rows of a strip that are added to at once: their product is all the memory that adding takes
_STRIPS = 8  # at most; the task of each reads all inputs


@dataclass(frozen=True)
class StoredMoments:
    """Moments of one input, in the strips in which tasks left them."""

    exchange: Exchange
    module: str
    """The first that reads it."""
    width: int
    count: int
    """Tokens."""

    def load(self, device: torch.device) -> InputMoments:
        """Put the strips together."""
        second = torch.zeros(self.width, self.width, dtype=torch.float64, device=device)
        total, shift = torch.zeros_like(second[0]), torch.zeros_like(second[0])
        for strip in strips(self.width) if self.count else ():
            part = self.exchange.get(strip_key(self.module, strip))
            second[strip, strip.start :] = part["second"].to(device)
            total[strip] = part["total"].to(device)
            shift[strip.start :] = part["shift"].to(device)
        for band in _bands(self.width):
            second[band.stop :, band] = second[band, band.stop :].mT
        return InputMoments(self.count, shift, total, second)

    def drop(self) -> None:
        """Forget them."""
        for strip in strips(self.width):
            self.exchange.drop(strip_key(self.module, strip))


def strips(width: int) -> list[slice]:
    """Return the rows of each strip."""
    height = -(-width // (_STRIPS * _BAND)) * _BAND
    return [slice(first, min(first + height, width)) for first in range(0, width, height)]


def strip_key(module: str, strip: slice) -> str:
    """Return what a strip is kept under."""
    return f"{module}-{strip.start}"


def strip_bytes(strip: slice, width: int) -> int:
    """Return the memory that adding to a strip takes, as it is and as it will be."""
    height: int = strip.stop - strip.start
    return (16 * height + 4 * _BAND + 8 * _ROWS) * width


def begun(strip: slice, mean: Tensor) -> dict[str, Tensor]:
    """Return a strip without rows, about a point [in] near their mean, which so takes no digits from them."""
    height, shift = strip.stop - strip.start, mean[strip.start :]
    second = torch.zeros(height, len(shift), dtype=torch.float64, device=mean.device)
    return {"shift": shift, "total": torch.zeros_like(second[:, 0]), "second": second}


def add_rows(sums: dict[str, Tensor], strip: slice, rows: Tensor) -> None:
    """Add rows [n, in] to a strip."""
    for part in rows[:, strip.start :].split(_ROWS):
        moved = part.float() - sums["shift"]
        sums["total"] += moved[:, : len(sums["total"])].sum(0, dtype=torch.float64)
        for band in _bands(len(sums["total"])):
            sums["second"][band, band.start :] += moved[:, band].mT @ moved[:, band.start :]


def _bands(height: int) -> Iterator[slice]:
    for first in range(0, height, _BAND):
        yield slice(first, min(first + _BAND, height))
