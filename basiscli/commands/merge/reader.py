"""Reading one tensor of all models of a merge."""

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
    """One tensor of all models: read in blocks of rows, checked and digested on the way."""

    def __init__(self, plan: MergePlan, name: str, device: torch.device) -> None:
        self.plan, self.name, self.device = plan, name, device
        self.shape = self.plan.reference.tensors[name].shape
        # Digests of what is read in order from its first to its last row; keyed by the model's place, -1 for the base.
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
        """Yield the blocks of rows to work on; None for all of it at once."""
        return iter([None]) if whole else row_blocks(self.shape, block_elements(self.device.type))

    def merge_blocks(self) -> Iterator[Block]:
        """Yield the tensor of base (if any) and models as the merge method takes it; may be gone over several times.

        The first time everything is checked and digested. A method that measures finds tensors of moderate size at hand
        afterwards; larger ones are read again.
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
        return [self._read_model(place, model, rows, base) for place, model in enumerate(self.plan.models)]

    def base(self, rows: slice | None) -> Tensor:
        """Return some rows of the reference alone."""
        return self._read(-1, self.plan.reference, rows)

    @property
    def dtype(self) -> str:
        """The dtype of the arithmetic: F32, or F64 where any input is F64."""
        return "F64" if self._wide else "F32"

    @property
    def in_factors(self) -> bool:
        """Whether every model's task vector is a product of two factors."""
        return all(isinstance(model, AdapterView) and model.is_low_rank(self.name) for model in self.plan.models)

    @property
    def factors(self) -> list[float]:
        """What multiplies each task vector: the first may be an earlier sum that is taken back to its own scale."""
        first = self.plan.weights[0] if self.plan.history else 1.0
        return [first, *(1.0 for _ in self.plan.models[1:])]

    def zero_gram(self) -> Tensor:
        """Return the matrix of inner products of no rows yet."""
        count = len(self.plan.models)
        return torch.zeros(count, count, dtype=torch.float64, device=self.device)

    def differences(self, rows: slice | None, base: Tensor) -> list[Tensor]:
        """Return some rows of every model's task vector, dense, given those of the base."""
        return [values - base for values in self._others(rows, base)]

    def statistics(self) -> Tensor:
        """Read everything once: check that it is finite, digest it, and return the task vectors' inner products."""
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
        """Yield the task vectors one at a time; see `TaskVectors`."""
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
        """The Frobenius norm of the base's tensor, as far as `statistics` had to read it."""
        return math.sqrt(self._base_square)

    def digests(self) -> dict[str, str]:
        """Return the digests of what was read, by the model's place ('-1' for the base)."""
        return {str(place): hasher.hexdigest() for place, hasher in self._hashers.items()}

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

    def _read_model(self, place: int, model: Model, rows: slice | None, base: Tensor | None) -> Tensor:
        if self.name not in model.tensors:
            return base.clone() if base is not None else self._fetch(self.plan.reference, rows)
        if isinstance(model, Checkpoint):
            return self._read(place, model, rows)
        # The base is at hand: do not read it once an adapter. In a recipe an adapter may be on another model.
        if base is not None and model.base is self.plan.base and model.is_low_rank(self.name):
            update = self._low_rank(model)
            values = base + update.dense(rows) if update.rank else base.clone()
        else:
            values = self._fetch(model, rows)
        if not (self._checked or is_finite(values)):
            self._refuse_nonfinite(model)
        return values

    def _read(self, place: int, checkpoint: Checkpoint, rows: slice | None) -> Tensor:
        if self._checked:
            return self._fetch(checkpoint, rows)
        values = self._fetch(checkpoint, rows, self._hashers.setdefault(place, hashlib.sha256()).update)
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
