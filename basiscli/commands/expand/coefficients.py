"""Coefficients of random bases (NOLA) as LoRA: the factors that they and the seed stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from basiscli.checkpoints.adapter import Adapter
from basiscli.checkpoints.header import TensorSpec
from basiscli.checkpoints.source import Source
from basiscli.commands.expand.lora import PlainLoRA

if TYPE_CHECKING:
    from torch import Tensor


class CoefficientsAsLoRA(PlainLoRA):
    """A = Σ aᵢ Aᵢ and B = Σ bⱼ Bⱼ in float32, of the same rank and on the same base; it needs no weights of that."""

    def __init__(self, source: Source) -> None:
        """Open a NOLA adapter.

        Raises:
            InputError: it is not one, or its configuration and coefficients do not fit together.
        """
        self.sources = [source]
        self._adapter = Adapter(source)
        self.modules = len(self._adapter.modules)
        stored = self._adapter.parts.tensors
        self.tensors = {name: TensorSpec(name, tensor.dtype, tensor.shape) for name, tensor in stored.items()}

    def config(self) -> dict[str, Any]:
        """Return the configuration of LoRA with the same rank, α and modules."""
        return self._adapter.config

    def read(self, name: str) -> Tensor:
        """Return a factor, float32 [r, in] or [out, r]; other tensors as they are stored."""
        return self._adapter.parts.read(name).contiguous()

    def close(self) -> None:
        """Close the adapter's files."""
        self._adapter.weights.close()
