"""The parts that tensors play in a model."""

from __future__ import annotations

from enum import StrEnum


class Kind(StrEnum):
    """The part that a tensor plays."""

    LINEAR = "linear"
    EMBEDDING = "embedding"
    NORM = "norm"
    BIAS = "bias"
    CONV = "conv"
    BUFFER = "buffer"
    OTHER = "other"
