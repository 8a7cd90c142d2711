"""Reading of one tensor from all models of a merge."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from basiscli.checkpoints.adapter_view import AdapterView, Model
from basiscli.checkpoints.transfer import read_to
from basiscli.checkpoints.views import Checkpoint, row_blocks
from basiscli.commands.merge.plan import KEPT_BYTES, MergePlan, block_elements, kept_bytes
from basiscli.errors import InputError
from basiscli.linalg.finite import is_finite
from basiscli.linalg.lowrank import LowRank, gram, inner
from basiscli.transforms import Block


class TensorReader:
    """Reads one tensor of the base and all models in blocks of rows, checking for NaN and hashing at the first pass.

        read = TensorReader(plan, "model.layers.0.mlp.up_proj.weight", device)
        for block in read.merge_blocks():
            block.base, block.others  # float32 [rows, in], and one such a model
        read.digests()

    Values come on the device in `dtype`, whatever the storage.
    """

    def __init__(self, plan: MergePlan, name: str, device: torch.device) -> None:
        self.plan, self.name, self.device = plan, name, device
        self.shape = self.plan.reference.tensors[name].shape
        # SHA-256 of what is read in order from its first to its last row; keyed by the model's index, -1 for the base.
        self._hashers: dict[int, Any] = {}
        # The factors of adapters, small and needed again for every block of rows.
        self._updates: dict[AdapterView, LowRank] = {}
        self._base_square = 0.0
        self._checked = False
        self._kept: list[Block] | None = None
        self._wide = any(
            name in m.tensors and m.tensors[name].dtype == "F64" for m in [self.plan.reference, *self.plan.models]
        )

    def blocks(self, *, whole: bool = False) -> Iterator[slice | None]:
        """Yield slices of rows to read one after another; None for the whole tensor."""
        return iter([None]) if whole else row_blocks(self.shape, block_elements(self.device.type))

    def merge_blocks(self) -> Iterator[Block]:
        """Yield the tensor of base (if any) and models in blocks, or whole for a method that needs it; can be repeated.

        The first time everything is checked and hashed. For a method with `measure`, tensors of up to `KEPT_BYTES` stay
        in memory for the following times; larger ones are read again.
        """
        if self._kept is not None:
            yield from self._kept
            return
        method, kept = self.plan.method, list[Block]()
        keep = 0 < kept_bytes(self.plan, self.name) <= KEPT_BYTES
        if not self._checked:
            self._hashers.clear()  # of a first time that was broken off
        row = math.prod(self.shape[1:])
        in_blocks = method.elementwise or (method.rowwise and len(self.shape) > 1)
        for rows in self.blocks(whole=not in_blocks):
            base = self._read(-1, self.plan.base, rows) if self.plan.base is not None else None
            block = Block(rows, rows.start * row if rows else 0, base, self._others(rows, base))
            if keep:
                kept.append(block)
            yield block
            del base, block  # before the next is read
        self._checked = True
        self._kept = kept if keep else None

    def _others(self, rows: slice | None, base: Tensor | None) -> list[Tensor]:
        return [self._read_model(index, model, rows, base) for index, model in enumerate(self.plan.models)]

    def base(self, rows: slice | None) -> Tensor:
        """Return rows of the reference's tensor."""
        return self._read(-1, self.plan.reference, rows)

    @property
    def dtype(self) -> str:
        """The dtype of the arithmetic: F32, or F64 where any input is F64."""
        return "F64" if self._wide else "F32"

    @property
    def in_factors(self) -> bool:
        """Whether every model's task vector is low-rank: a product of LoRA factors."""
        return all(isinstance(model, AdapterView) and model.is_low_rank(self.name) for model in self.plan.models)

    @property
    def factors(self) -> list[float]:
        """One factor per task vector: with `--onto` the weight of the earlier merge's, which is first; else 1."""
        first = self.plan.weights[0] if self.plan.history else 1.0
        return [first, *(1.0 for _ in self.plan.models[1:])]

    def zero_gram(self) -> Tensor:
        """Return zeros [models, models] in float64 on the device, to add inner products to."""
        count = len(self.plan.models)
        return torch.zeros(count, count, dtype=torch.float64, device=self.device)

    def differences(self, rows: slice | None, base: Tensor) -> list[Tensor]:
        """Return rows of every model's dense task vector, given the same rows of the base."""
        return [values - base for values in self._others(rows, base)]

    def statistics(self) -> Tensor:
        """Return the task vectors' inner products, float64 [models, models], checking and hashing all that is read."""
        if self.in_factors:
            vectors = [self._low_rank(model) for model in self.plan.models]
            return torch.tensor([[inner(x, y) for y in vectors] for x in vectors], dtype=torch.float64)
        total = self.zero_gram()
        for rows in self.blocks():
            base = self.base(rows)
            self._base_square += inner(base, base)
            total += gram([difference.reshape(-1) for difference in self.differences(rows, base)])
        return total.cpu()

    def task_vectors(self) -> Iterator[Tensor | LowRank]:
        """Yield each model's task vector, dense or low-rank, times its factor; see `TaskVectors`."""
        base: Tensor | None = None
        for model, factor in zip(self.plan.models, self.factors, strict=True):
            if isinstance(model, AdapterView) and model.is_low_rank(self.name):
                update = self._low_rank(model)
                if update.rank:
                    yield update.scaled(factor)
                continue
            # `statistics` has checked and digested what is read here once more.
            base = self._fetch(self.plan.reference) if base is None else base
            values = self._fetch(model) if self.name in model.tensors else base
            yield (values - base) * factor if factor != 1.0 else values - base

    @property
    def weight_norm(self) -> float:
        """The Frobenius norm of the base's tensor; 0 before `statistics`, and where that reads factors alone."""
        return math.sqrt(self._base_square)

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of each tensor read, by the model's index as a string ('-1' for the base)."""
        return {str(index): hasher.hexdigest() for index, hasher in self._hashers.items()}

    def _low_rank(self, model: Model) -> LowRank:
        """Return an adapter's task vector in factors, of rank 0 where it leaves the tensor alone."""
        assert isinstance(model, AdapterView)
        if model not in self._updates:
            self._updates[model] = self._read_low_rank(model)
        return self._updates[model]

    def _read_low_rank(self, model: AdapterView) -> LowRank:
        update = model.low_rank(self.name)
        if update is None:
            rows, columns = self.shape[0] if self.shape else 1, math.prod(self.shape[1:])
            return LowRank(torch.zeros(rows, 0), torch.zeros(0, columns), self.shape).to(self.device)
        if not (is_finite(update.b) and is_finite(update.a)):
            self._refuse_nonfinite(model)
        return update.to(self.device)

    def _read_model(self, index: int, model: Model, rows: slice | None, base: Tensor | None) -> Tensor:
        if self.name not in model.tensors:
            return base.clone() if base is not None else self._fetch(self.plan.reference, rows)
        if isinstance(model, Checkpoint):
            return self._read(index, model, rows)
        # The base is at hand: do not read it once an adapter. In a recipe an adapter may be on another model.
        if base is not None and model.base is self.plan.base and model.is_low_rank(self.name):
            update = self._low_rank(model)
            values = base + update.dense(rows) if update.rank else base.clone()
        else:
            values = self._fetch(model, rows)
        if not (self._checked or is_finite(values)):
            self._refuse_nonfinite(model)
        return values

    def _read(self, index: int, checkpoint: Checkpoint, rows: slice | None) -> Tensor:
        if self._checked:
            return self._fetch(checkpoint, rows)
        values = self._fetch(checkpoint, rows, self._hashers.setdefault(index, hashlib.sha256()).update)
        if not is_finite(values):
            self._refuse_nonfinite(checkpoint)
        return values

    def _fetch(
        self, model: Model, rows: slice | None = None, seen: Callable[[memoryview], object] = lambda data: None
    ) -> Tensor:
        """Return rows of a model's tensor in the dtype of the arithmetic; `seen` gets the stored bytes."""
        raw = read_to(self.device, model, self.name, rows, seen)
        return raw.to(torch.float64 if self._wide else torch.float32)  # on the device: fewer bytes travel there

    def _refuse_nonfinite(self, model: Model) -> None:
        if not self.plan.settings.allow_nonfinite:
            stored = model.tensors[self.name]
            raise InputError(
                f"{model.source.spec} has a NaN or Inf",
                file=getattr(stored, "file", model.source.path),
                tensor=self.name,
                remedy="mend the checkpoint, or --allow-nonfinite to go on",
            )
