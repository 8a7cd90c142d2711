"""What all runs of `init` and `extract` have in common: weights are read, adapters written, and tasks handed out."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from basiscli.calibration.tokens import Windows
from basiscli.checkpoints.transfer import read_to
from basiscli.checkpoints.writer import PartialOutput
from basiscli.commands.init.plan import InitPlan
from basiscli.commands.init.stored import as_stored, write_stored
from basiscli.engine.batches import in_batches
from basiscli.engine.copying import copy_tensor
from basiscli.engine.devices import explain_out_of_memory
from basiscli.engine.tasks import Engine, Task
from basiscli.errors import InputError
from basiscli.linalg.finite import is_finite
from basiscli.linalg.svd import SVD
from basiscli.names import seed_for
from basiscli.progress import Progress

Entry = dict[str, Any]
"""What the journal has of one weight: its rank, digests of what was written, and numbers for the report."""
_COPY_WORKSPACE = 1 << 25
_SPECTRUM = 32  # singular values a weight that the report keeps


@dataclass
class InitRun(ABC):
    """One run of a plan into its partial output; `run_type` says which subclass carries out which plan.

    On a cluster every worker has a run of its own, of which it calls the methods that do tasks.
    """

    plan: InitPlan
    output: PartialOutput
    progress: Progress
    device: torch.device
    engine: Engine
    windows: Windows | None = None
    """The calibration text, once it is read."""
    ranks: dict[str, int] = field(default_factory=dict)
    """Of every weight, once they are known; 0 for one without factors."""

    def run(self) -> dict[str, Entry]:
        """Do what the journal does not have; return the journal, one entry a weight.

        Raises:
            InputError: a NaN or Inf, a file that changed while it was read, calibration that cannot be used.
            ResourceError: memory or disk ran out.
        """
        with explain_out_of_memory("fewer --workers, or --device cpu; the same command goes on where this one stopped"):
            self.write_weights()
        return self.output.finished

    @abstractmethod
    def write_weights(self) -> None:
        """Write the adapter, and the residual if there is one, as far as the journal does not have them."""

    def batch_key(self, name: str) -> Hashable | None:
        """Return what targets have in common that a GPU decomposes as one batch; None for one that needs no batch."""
        return None

    # Weights ----------------------------------------------------------------------------------------------------------

    def read_weight(self, name: str) -> tuple[Tensor, dict[str, str]]:
        """Return the matrix to decompose, and digests of what was read: '0' of the model, '1' of its base.

        The matrix is float32 [out, in] on the device: the weight, or its difference from the base's.

        Raises:
            InputError: NaN or Inf.
        """
        read: dict[str, str] = {}
        weights: list[Tensor] = []
        for number, checkpoint in enumerate(filter(None, (self.plan.model, self.plan.base))):
            hasher = hashlib.sha256()
            weights.append(read_to(self.device, checkpoint, name, seen=hasher.update).float())
            read[str(number)] = hasher.hexdigest()
            if not is_finite(weights[-1]):
                raise InputError(
                    "the tensor holds NaN or Inf",
                    file=checkpoint.tensors[name].file,
                    tensor=name,
                    remedy="a matrix with NaN has no singular values: give a sound checkpoint",
                )
        weight = weights[0] if len(weights) == 1 else weights[0] - weights[1]
        return (weight.mT.contiguous() if name in self.plan.transposed else weight), read

    def svd(self, name: str) -> SVD:
        """Return how a weight, or the moments of its inputs, are decomposed: with a seed of its own."""
        return SVD(self.plan.exact, seed_for(self.plan.settings.seed, name))

    def copy(self, name: str) -> Entry:
        """Copy a tensor of the model to the residual; return its entry."""
        allow = self.plan.settings.allow_nonfinite
        return {"digests": {name: copy_tensor(self.plan.model, self.output, name, allow_nonfinite=allow)}}

    def rounded(self, name: str, rank: int, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a weight's adapter, in their format's order, by their names and in their dtypes.

        Raises:
            InputError: values that do not fit the dtype.
        """
        specs = self.plan.adapter_tensors(name, rank)
        return {s.name: as_stored(self.output, s.name, t) for s, t in zip(specs, tensors, strict=True)}

    def write_adapter(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Write tensors of the adapter by name; return their SHA-256."""
        return write_stored(self.output, tensors)

    # Tasks ------------------------------------------------------------------------------------------------------------

    def tasks(self, names: Iterable[str]) -> list[Task]:
        """Return a task for each of these tensors of the model that the journal does not have."""
        plan, tensors = self.plan, self.plan.model.tensors
        return self.unfinished(
            Task(name, tensors[name].nbytes, plan.workspace(name) if name in plan.targets else _COPY_WORKSPACE, (name,))
            for name in names
        )

    def unfinished(self, tasks: Iterable[Task]) -> list[Task]:
        """Return those of a pass's tasks that the journal does not have, as batches where a GPU is to do them."""
        return in_batches(tasks, self._batch_key, device=self.device, done=self.output.finished)

    def do(self, tasks: Sequence[Task], work: Callable[..., Entry]) -> None:
        """Do tasks on the engine, and record each in the journal."""
        self.engine.run_tasks(tasks, work, self.output.record, progress=self.progress, what=self.plan.method.name)

    def forget_unwritten(self) -> None:
        """Drop from the journal what it says is finished and the disk does not have: it is done again."""
        for name, entry in list(self.output.finished.items()):
            if any(self.output.digest_on_disk(key) != sha for key, sha in entry["digests"].items()):
                del self.output.finished[name]

    def _batch_key(self, task: Task) -> Hashable | None:
        return self.batch_key(task.key) if task.key in self.plan.targets else None


def norm_and_energy(weight: Tensor, rest: Tensor) -> dict[str, float]:
    """Return a matrix's Frobenius norm, and the share of its square that is not in `rest`."""
    total = float(weight.square().sum(dtype=torch.float64))
    left = float(rest.square().sum(dtype=torch.float64))
    return {"norm": total**0.5, "energy": 1 - left / total if total else 1.0}


def shown(spectrum: Tensor) -> list[float]:
    """Return the first 32 values with as many digits as a picture can show."""
    return [float(f"{value:.6g}") for value in spectrum[:_SPECTRUM].tolist()]
