"""Random masks with the same bits for any size and order of blocks, on any device.

The words are Philox-4x64-10's (Salmon et al., 'Parallel random numbers: as easy as 1, 2, 3', SC 2011), a function of a
key and a counter: those of any part of a tensor are made without the ones before. numpy fixes its bit generators'
streams for good (NEP 19), which torch does not.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_PER_STEP = 8  # 32-bit words that one step of the counter gives


def words(seed: int, stream: int, start: int, count: int) -> npt.NDArray[np.uint32]:
    """Return the 32-bit random words `start` to `start + count − 1` of one of a seed's streams."""
    generator = np.random.Philox(key=stream << 64 | seed)
    generator.advance(start // _PER_STEP)
    skip = start % _PER_STEP
    raw = np.atleast_1d(generator.random_raw((skip + count + 1) // 2))
    return raw.astype("<u8", copy=False).view("<u4")[skip : skip + count]


def bernoulli(like: Tensor, probability: float, seed: int, stream: int, start: int) -> Tensor:
    """Return a random mask of ones and zeros with a block's shape, dtype and device.

    Args:
        like: the block.
        probability: of a one, to a precision of 2⁻³².
        seed: of the tensor that the block is part of.
        stream: one per mask of a seed: the model's index.
        start: index of the block's first element in the flat tensor.
    """
    drawn = words(seed, stream, start, like.numel()) < round(probability * 2**32)
    return _as_mask(drawn, like)


def bernoulli_each(probabilities: Tensor, seed: int, stream: int, start: int) -> Tensor:
    """Return a random mask with one probability per element (any shape); otherwise as `bernoulli`."""
    uniform = words(seed, stream, start, probabilities.numel()) * np.float64(2**-32)
    return _as_mask(uniform < probabilities.reshape(-1).cpu().numpy(), probabilities)


def _as_mask(drawn: npt.NDArray[np.bool_], like: Tensor) -> Tensor:
    dtype = np.float64 if like.dtype == torch.float64 else np.float32
    return torch.from_numpy(drawn.astype(dtype)).to(like.device).view(like.shape)
