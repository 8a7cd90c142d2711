"""`extract --energy`: each difference gets the rank that holds a given share of its squared norm."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from contextlib import closing
from pathlib import Path

from torch import Tensor

from basiscli.checkpoints.digests import digest
from basiscli.checkpoints.dtypes import raw_bytes
from basiscli.checkpoints.header import TensorSpec
from basiscli.checkpoints.scratch import write_file
from basiscli.checkpoints.source import Source
from basiscli.checkpoints.views import Checkpoint
from basiscli.commands.init.formats import LoRAFormat
from basiscli.commands.init.run import Entry, InitRun, norm_and_energy, shown
from basiscli.errors import BasisError, InputError
from basiscli.linalg.svd import svd_by_energy


class EnergyRun(InitRun):
    """Factors wait in scratch files, one a weight, until all ranks are known, and with them the adapter's shapes."""

    def write_weights(self) -> None:
        """Decompose all differences, then write the adapter.

        Raises:
            InputError: there is no difference in any target.
        """
        self._forget_lost_scratch()
        self.do(self.tasks(self.plan.targets), self.truncate)
        self.ranks = {name: self.output.finished[name]["rank"] for name in self.plan.targets}
        if not any(self.ranks.values()):
            raise InputError(
                "the model does not differ from its base",
                file=self.plan.model.source.path,
                remedy="check that these are the two models you mean",
            )
        self.output.allocate(self.plan.layout_of(self.ranks))
        for name, rank in self.ranks.items():
            if rank:
                self.output.record(name, self.output.finished[name] | {"digests": self.write_factors(name)})

    def batch_key(self, name: str) -> Hashable:
        """Return the shape, whichever way it lies: the smaller Gram matrix is decomposed."""
        return tuple(sorted(self.plan.linear_shape(name)))

    def truncate(self, name: str) -> Entry:
        """Keep of one difference U Σ Vᵀ what holds the energy: A = √Σ_r V_rᵀ and B = U_r √Σ_r, in a scratch file."""
        assert self.plan.energy is not None
        weight, read = self.read_weight(name)
        u, s, vh = svd_by_energy(weight, self.plan.energy, self.plan.rank, self.svd(name))
        rest = weight - (u * s) @ vh
        root = s.sqrt()
        factors = [root[:, None] * vh, u * root]
        if len(s):
            specs = [TensorSpec(key, "F32", tuple(factor.shape)) for key, factor in zip("ab", factors, strict=True)]
            write_file(self._scratch(name), specs, factors)
        return norm_and_energy(weight, rest) | {
            "inputs": read,
            "rank": len(s),
            "spectrum": shown(s),
            "digests": {},
            "scratch": _digest(factors),
        }

    def write_factors(self, name: str) -> dict[str, str]:
        """Write a weight's factors from its scratch file into the adapter; return their digests by name."""
        a, b = self._read_scratch(name)
        rank = len(a)
        return self.write_adapter(self.rounded(name, rank, LoRAFormat().stored((b, a), self.plan.scaling(rank))))

    # Scratch ----------------------------------------------------------------------------------------------------------

    def _forget_lost_scratch(self) -> None:
        """Drop from the journal what did not reach the disk: it is done again."""
        for name, entry in list(self.output.finished.items()):
            if entry["rank"] and self._scratch_digest(name) != entry["scratch"]:
                del self.output.finished[name]

    def _scratch(self, name: str) -> Path:
        return self.output.scratch / f"{self.plan.modules[name].index}.safetensors"

    def _read_scratch(self, name: str) -> list[Tensor]:
        """Return A and B of a weight, float32."""
        with closing(Checkpoint.open(Source("factors", self._scratch(name)))) as stored:
            return [stored.read("a"), stored.read("b")]

    def _scratch_digest(self, name: str) -> str:
        try:
            return _digest(self._read_scratch(name))
        except BasisError:
            return ""


def _digest(factors: Iterable[Tensor]) -> str:
    return digest(map(raw_bytes, factors))
