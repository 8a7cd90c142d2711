"""The formats that PEFT and basis store an adapter in: LoRA, TinyLoRA and NOLA.

A format knows the tensors of one module in `adapter_model.safetensors`. LoRA and TinyLoRA are made of factors, and know
how what an init method returns becomes those tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel

from basiscli.checkpoints.header import TensorSpec
from basiscli.checkpoints.nola import coefficient_counts
from basiscli.checkpoints.tinylora import selectors
from basiscli.transforms import Method

if TYPE_CHECKING:
    from torch import Tensor

    from basiscli.linalg.lowrank import LowRank


@dataclass(frozen=True)
class Module:
    """A linear layer of the loaded model that gets an adapter."""

    name: str
    """As `named_modules()` has it."""
    index: int
    """Among the modules of the adapter, from 0; PEFT's TinyLoRA numbers its vectors v so."""
    in_features: int
    out_features: int
    dtype: str
    """Of the adapter's tensors, as safetensors calls it: 'F32', 'BF16'."""

    @property
    def key(self) -> str:
        """What the names of its tensors begin with in an adapter file."""
        return f"base_model.model.{self.name}"


class AdapterFormat(ABC):
    """How the adapter of one linear layer is stored."""

    kind: ClassVar[str]
    """What a report calls its tensors."""

    @abstractmethod
    def tensors(self, module: Module, rank: int) -> list[TensorSpec]:
        """Return names, dtypes and shapes of a module's tensors, rank ≥ 1."""

    def trained_parameters(self, module: Module, rank: int) -> int:
        """Return how many numbers of a module are trained; all that are stored, unless a format says otherwise."""
        return sum(spec.count for spec in self.tensors(module, rank))


class FactorFormat(AdapterFormat):
    """A format that stores the factors B [out, r] and A [r, in] which an init method returns."""

    returns: ClassVar[str]
    """What such a method returns, for the message about one that does not."""

    @abstractmethod
    def shapes(self, weight: tuple[int, ...], rank: int) -> list[tuple[int, ...]]:
        """Return the shapes of what a method must return for a weight [out, in]."""

    @abstractmethod
    def stored(self, returned: Sequence[Tensor], scaling: float) -> list[Tensor]:
        """Return the tensors to store, in the order of `tensors`, not yet rounded to their dtype.

        Args:
            returned: what the method returned.
            scaling: what PEFT multiplies B·A with; both factors are divided by its root.
        """

    @abstractmethod
    def update(self, stored: Sequence[Tensor]) -> LowRank:
        """Return ΔW / scaling [out, in] of stored tensors as a product of two float32 matrices."""


class LoRAFormat(FactorFormat):
    """PEFT's LoRA: ΔW = scaling · B A; A and B are trained."""

    kind = "lora"
    returns = "B [out, rank] and A [rank, in]"

    def tensors(self, module: Module, rank: int) -> list[TensorSpec]:
        """Return A [r, in] and B [out, r]."""
        return [
            TensorSpec(f"{module.key}.lora_A.weight", module.dtype, (rank, module.in_features)),
            TensorSpec(f"{module.key}.lora_B.weight", module.dtype, (module.out_features, rank)),
        ]

    def shapes(self, weight: tuple[int, ...], rank: int) -> list[tuple[int, ...]]:
        """Return those of (B, A)."""
        return [(weight[0], rank), (rank, weight[1])]

    def stored(self, returned: Sequence[Tensor], scaling: float) -> list[Tensor]:
        """Return A / √scaling and B / √scaling."""
        b, a = returned
        return [a / scaling**0.5, b / scaling**0.5]

    def update(self, stored: Sequence[Tensor]) -> LowRank:
        """Return B A."""
        from basiscli.linalg.lowrank import LowRank

        a, b = (factor.float() for factor in stored)
        return LowRank(b, a, (len(b), a.shape[1]))


class TinyLoRAFormat(FactorFormat):
    """PEFT's TinyLoRA: ΔW = B (Σᵢ vᵢ Pᵢ) A = B diag(v) A; v alone is trained.

    Pᵢ [r, r] is 1 at (i, i) and 0 elsewhere: it says where between B and A the value vᵢ stands.
    """

    kind = "tinylora"
    returns = "B [out, rank], σ [rank] and A [rank, in]"

    def tensors(self, module: Module, rank: int) -> list[TensorSpec]:
        """Return A [r, in], B [out, r], P [r, r, r] in uint8, and v [r], which has the module's index for a name."""
        return [
            TensorSpec(f"{module.key}.tinylora_A", module.dtype, (rank, module.in_features)),
            TensorSpec(f"{module.key}.tinylora_B", module.dtype, (module.out_features, rank)),
            TensorSpec(f"{module.key}.tinylora_P", "U8", (rank, rank, rank)),
            TensorSpec(f"base_model.tinylora_v.{module.index}", module.dtype, (rank,)),
        ]

    def trained_parameters(self, module: Module, rank: int) -> int:
        """Return r."""
        return rank

    def shapes(self, weight: tuple[int, ...], rank: int) -> list[tuple[int, ...]]:
        """Return those of (B, σ, A)."""
        return [(weight[0], rank), (rank,), (rank, weight[1])]

    def stored(self, returned: Sequence[Tensor], scaling: float) -> list[Tensor]:
        """Return A and B, each divided by √scaling, P, and σ as the first v."""
        b, values, a = returned
        return [a / scaling**0.5, b / scaling**0.5, selectors(len(a)), values]

    def update(self, stored: Sequence[Tensor]) -> LowRank:
        """Return B diag(v) A."""
        from basiscli.linalg.lowrank import LowRank

        a, b, _, values = stored
        return LowRank(b.float() * values.float(), a.float(), (len(b), a.shape[1]))


@dataclass(frozen=True)
class NOLAFormat(AdapterFormat):
    """NOLA: A = Σ aᵢ Aᵢ and B = Σ bⱼ Bⱼ with random Aᵢ and Bⱼ from a seed; the coefficients a and b are trained."""

    bases: int
    """Random matrices a factor, at most."""
    dtype: str
    """Of the coefficients, whatever the model's: they are few, and stay as exact as they are trained."""
    kind: ClassVar[str] = "nola"

    def tensors(self, module: Module, rank: int) -> list[TensorSpec]:
        """Return a and b, vectors."""
        counts = coefficient_counts(self.bases, rank, module.in_features, module.out_features)
        return [TensorSpec(f"{module.key}.nola_{f}", self.dtype, (n,)) for f, n in zip("ab", counts, strict=True)]


def format_of(method: Method, parameters: BaseModel, dtype: str | None) -> AdapterFormat:
    """Return the format of the adapters that an init method starts.

    Args:
        method: which of A and B, values between them, or coefficients of random bases it trains.
        parameters: the method's.
        dtype: what the command line asks for, as safetensors calls it; None for the model's own.
    """
    if method.trains == "coefficients":
        return NOLAFormat(parameters.bases, dtype or "F32")  # type: ignore[attr-defined]
    return TinyLoRAFormat() if method.trains == "values" else LoRAFormat()
