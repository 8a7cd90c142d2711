"""A fast check for NaN and Inf."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def is_finite(values: Tensor) -> bool:
    """Return whether every element is finite, in one pass without a mask: NaN and Inf survive a sum.

    A sum can also overflow on its own; only then every element is looked at.
    """
    if not values.is_floating_point() or math.isfinite(float(values.sum())):
        return True
    return bool(torch.isfinite(values).all())
