"""What a KV compression is given and what it returns: `AttentionMoments`, and `KVCompression` to derive from.

The core runs the model and takes the moments, trains the bases with the method's loss, searches the ranks and writes
the result. A method says where bases begin, how free parameters turn them, and what they are trained for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

from basiscli.transforms.parameters import Parameters

if TYPE_CHECKING:
    from torch import Generator, Tensor


@dataclass(frozen=True)
class AttentionMoments:
    """Second moments XᵀX over the calibration tokens, one matrix a layer and KV head: float64 [layers, heads, d, d]."""

    keys: Tensor
    """Of the keys as they are cached, after RoPE."""
    values: Tensor
    queries: Tensor
    """Of the queries after RoPE, summed over the query heads that share the KV head."""
    outputs: Tensor
    """W_oᵀ W_o of the output projection's columns for the KV head: how an error of the value weighs in the output."""


class KVCompression(ABC):
    """A method that finds an orthogonal basis of the keys and one of the values, for each layer and KV head.

    Bases are float32 [layers, 2, KV heads, d, d] (keys first, then values), columns in falling importance. The core
    runs the model; while it trains, `turned(start, free)` are the bases, `free` is what is learned (zeros at first),
    and every step keeps the numbers of columns that `draw` returns.
    """

    Parameters: ClassVar[type[BaseModel]] = Parameters

    def __init__(self, parameters: Any) -> None:
        self.parameters = parameters

    @abstractmethod
    def start(self, moments: AttentionMoments) -> Tensor:
        """Return the bases before training [layers, 2, KV heads, d, d]."""

    @abstractmethod
    def turned(self, start: Tensor, free: Tensor) -> Tensor:
        """Return the bases that free parameters of the same shape make of `start`; zeros give `start` itself."""

    @abstractmethod
    def draw(self, shape: tuple[int, ...], levels: int, generator: Generator) -> Tensor:
        """Return how many of `levels` equal groups of columns each basis keeps in one training step, as integers."""

    @abstractmethod
    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of logits [tokens, vocabulary] against the dense model's and the labels [tokens]."""

    @abstractmethod
    def learning_rate(self, step: int, steps: int) -> float:
        """Return AdamW's learning rate at a step, counted from 0."""
