"""Running an initialisation: a weight at a time becomes two factors and what they leave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from basiscli.checkpoints.digests import digest
from basiscli.checkpoints.dtypes import raw_bytes, torch_dtype
from basiscli.checkpoints.writer import PartialOutput
from basiscli.engine.copying import copy_tensor
from basiscli.engine.init_plan import InitPlan
from basiscli.engine.local import Progress, Task, run_tasks
from basiscli.engine.tensor_reader import is_finite
from basiscli.errors import BasisError, InputError, ResourceError
from basiscli.linalg.svd import SVD
from basiscli.names import seed_for


@dataclass
class InitRun:
    """One run of a plan into its partial output."""

    plan: InitPlan
    output: PartialOutput
    progress: Progress
    device: torch.device

    def run(self) -> dict[str, dict[str, Any]]:
        """Do what the journal does not have; return the journal, one entry a weight.

        Raises:
            InputError: a NaN or Inf, a file that changed while it was read.
            ResourceError: memory or disk ran out.
        """
        plan, tensors = self.plan, self.plan.model.tensors
        for name, entry in list(self.output.finished.items()):  # what did not reach the disk is done again
            if any(self.output.digest_on_disk(key) != sha for key, sha in entry["digests"].items()):
                del self.output.finished[name]
        work = [(name, plan.workspace(name), self._factorise) for name in plan.targets]
        work += [(name, 1 << 25, self._copy) for name in plan.copied]
        tasks = [
            Task(name, tensors[name].nbytes, space, lambda name=name, do=do: do(name))  # type: ignore[misc]
            for name, space, do in work
            if name not in self.output.finished
        ]
        try:
            run_tasks(
                tasks, self.output.record, workers=plan.settings.workers, progress=self.progress, what=plan.method.name
            )
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise ResourceError(
                "out of memory",
                remedy="fewer --workers, or --device cpu; the same command goes on where this one stopped",
            ) from error
        return self.output.finished

    def _copy(self, name: str) -> dict[str, Any]:
        allow = self.plan.settings.allow_nonfinite
        return {"digests": {name: copy_tensor(self.plan.model, self.output, name, allow_nonfinite=allow)}}

    def _factorise(self, name: str) -> dict[str, Any]:
        """Write the factors of one weight, and the weight without them.

        The residual is taken from the factors as they are stored, so that their rounding is in it and the sum is the
        weight again, to one rounding of the residual.
        """
        plan = self.plan
        weight, read = self._weight(name)
        space = SVD(plan.exact, seed_for(plan.settings.seed, name))
        b, a = plan.method.call(plan.values, {"weight": weight, "rank": plan.rank, "svd": space})
        fit = b.shape == (weight.shape[0], plan.rank) and a.shape == (plan.rank, weight.shape[1])
        if not (fit and is_finite(b) and is_finite(a)):
            what = f"factors of {list(b.shape)} and {list(a.shape)}" if not fit else "factors with NaN or Inf"
            raise BasisError(
                f"{plan.method.name} made {what}",
                tensor=name,
                remedy="an init method returns B [out, rank] and A [rank, in]; report this to its author",
            )
        key_a, key_b = plan.keys(name)
        root = plan.scaling**0.5
        stored_a, stored_b = self._stored(key_a, a / root), self._stored(key_b, b / root)
        product = plan.scaling * (stored_b.float().to(weight) @ stored_a.float().to(weight))
        total = float(weight.square().sum(dtype=torch.float64))
        rest = weight - product
        entry: dict[str, Any] = {
            "norm": total**0.5,
            "energy": 1 - float(rest.square().sum(dtype=torch.float64)) / total if total else 1.0,
            "inputs": read,
        }
        digests = {key: digest([self.output.write(key, part)]) for key, part in ((key_a, stored_a), (key_b, stored_b))}
        if plan.base is None:
            stored = self._stored(name, rest.mT.contiguous() if plan.transposed else rest)
            digests[name] = digest([self.output.write(name, stored)])
            back = stored.to(weight).mT if plan.transposed else stored.to(weight)
            entry["error"] = float((back + product - weight).norm() / weight.norm().clamp_min(1e-30))
        return entry | {"digests": digests}

    def _weight(self, name: str) -> tuple[Tensor, dict[str, str]]:
        """Return the matrix to decompose, float32 [out, in] on the device, and digests of what was read."""
        plan, read = self.plan, {}
        parts = []
        for place, checkpoint in enumerate(filter(None, (plan.model, plan.base))):
            raw = checkpoint.read(name)
            read[str(place)] = digest([raw_bytes(raw)])
            parts.append(raw.to(self.device).float())
            if not is_finite(parts[-1]):
                raise InputError(
                    "the tensor holds NaN or Inf",
                    file=checkpoint.tensors[name].file,
                    tensor=name,
                    remedy="a matrix with NaN has no singular values: give a sound checkpoint",
                )
        weight = parts[0] if len(parts) == 1 else parts[0] - parts[1]
        return (weight.mT.contiguous() if plan.transposed else weight), read

    def _stored(self, name: str, values: Tensor) -> Tensor:
        """Round to the storage dtype and check."""
        dtype = self.plan.layout.tensors[name].dtype
        stored = values.to(torch_dtype(dtype)).contiguous()
        if not is_finite(stored):
            raise InputError(f"the values do not fit {dtype}", tensor=name, remedy="a wider --dtype (bf16 or f32)")
        return stored
