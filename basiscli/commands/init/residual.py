"""What becomes of the base model while its weights are decomposed: nothing, a residual, or one that is made for NF4."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from basiscli.checkpoints.shards import Shards
from basiscli.commands.init.plan import InitPlan
from basiscli.commands.init.stored import as_stored, write_stored
from basiscli.linalg.nf4 import nf4_rounded, quantised_start

NF4_ROUNDS = 5  # what QPiSSA's paper takes: the error falls fast at first, and each round is another decomposition

Decompose = Callable[[Tensor], tuple[Tensor, ...]]
"""From a matrix [out, in] to what an init method returns for it, such as (B, A)."""


@dataclass(frozen=True)
class Residual:
    """The adapter's base is W − s·B·A, in the storage dtype.

    It is taken from the factors as they are stored, so that their rounding is in it and the sum is the weight again, to
    one rounding of the residual.
    """

    output: Shards
    transposed: frozenset[str]
    """Whether weights are stored as [in, out]."""

    def factors(self, weight: Tensor, decompose: Decompose) -> tuple[Tensor, ...]:
        """Return the factors that training begins with, of a weight [out, in]."""
        return decompose(weight)

    def write(self, name: str, weight: Tensor, update: Tensor, rest: Tensor) -> tuple[dict[str, str], dict[str, float]]:
        """Write what the base has in place of a weight W.

        Args:
            name: of the weight.
            weight: W [out, in], float32.
            update: s·B·A [out, in] of the factors as they are stored.
            rest: W − s·B·A.

        Returns:
            The SHA-256 of what was written by tensor name, and errors by the names that a report has for them.
        """
        stored = as_stored(self.output, name, rest.mT.contiguous() if name in self.transposed else rest)
        digests = write_stored(self.output, {name: stored})
        # Linear layers compute with [out, in], and quantise it row by row; a 4-bit load turns GPT-2's Conv1D first.
        return digests, self.errors(weight, update, stored.mT.contiguous() if name in self.transposed else stored)

    def errors(self, weight: Tensor, update: Tensor, base: Tensor) -> dict[str, float]:
        """Return ‖base + s·B·A − W‖ / ‖W‖ for a stored base [out, in]."""
        return {"error": float((base.to(weight) + update - weight).norm() / weight.norm().clamp_min(1e-30))}


class NoResidual(Residual):
    """The base stays as it is, as with `extract`, whose factors are those of a difference from it."""

    def write(self, name: str, weight: Tensor, update: Tensor, rest: Tensor) -> tuple[dict[str, str], dict[str, float]]:
        """Write nothing."""
        return {}, {}


class NF4Residual(Residual):
    """A residual that will be loaded in NF4, and whose rounding the factors take up (QPiSSA)."""

    def factors(self, weight: Tensor, decompose: Decompose) -> tuple[Tensor, ...]:
        """Return (B, A) of the last of five rounds; see `quantised_start`."""

        def pair(matrix: Tensor) -> tuple[Tensor, Tensor]:
            b, a = decompose(matrix)
            return b, a

        return quantised_start(weight, pair, rounds=NF4_ROUNDS)

    def errors(self, weight: Tensor, update: Tensor, base: Tensor) -> dict[str, float]:
        """Add the Frobenius norms of what NF4 takes from the base with its adapter, and from W itself (QLoRA).

        Both are rounded as they are stored: what a 4-bit load computes with.
        """
        return super().errors(weight, update, base) | {
            "nf4_error": float((nf4_rounded(base).to(weight) + update - weight).norm()),
            "nf4_error_qlora": float((nf4_rounded(weight.to(base)).to(weight) - weight).norm()),
        }


def residual_of(plan: InitPlan, output: Shards) -> Residual:
    """Return what becomes of the base of a plan's adapter."""
    if not plan.has_residual:
        return NoResidual(output, plan.transposed)
    return (NF4Residual if plan.quantize else Residual)(output, plan.transposed)
