"""Running the plan of a merge, one task per tensor, in blocks of rows or whole matrices."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from basiscli.checkpoints.digests import digest, file_digest
from basiscli.checkpoints.dtypes import torch_dtype
from basiscli.checkpoints.header import TensorSpec
from basiscli.checkpoints.scratch import write_file
from basiscli.checkpoints.source import Source
from basiscli.checkpoints.transfer import read_to
from basiscli.checkpoints.views import Checkpoint
from basiscli.checkpoints.writer import PartialOutput
from basiscli.commands.merge.as_adapter import factor_keys
from basiscli.commands.merge.plan import MergePlan, block_elements, is_decomposed, workspace
from basiscli.commands.merge.reader import TensorReader
from basiscli.engine.batches import in_batches
from basiscli.engine.devices import explain_out_of_memory
from basiscli.engine.tasks import Engine, Task
from basiscli.errors import BasisError, InputError
from basiscli.linalg.finite import is_finite
from basiscli.linalg.lowrank import LowRank, gram, inner
from basiscli.model.architecture import Kinds, kind_by_name, kinds
from basiscli.names import seed_for
from basiscli.progress import Progress
from basiscli.transforms import Blocks, Kind, Norms, TaskVectorMerge, TaskVectors

MERGE, WRITE = "merge", "write"  # prefixes of the journal's keys, one a pass


@dataclass
class MergeRun:
    """Runs the plan of a merge into its partial output."""

    plan: MergePlan
    output: PartialOutput
    progress: Progress
    device: torch.device
    engine: Engine
    kinds: Kinds = field(init=False)
    copied: frozenset[str] = field(init=False)
    numbers: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.copied = frozenset(self.plan.copied)
        tensors = self.plan.reference.tensors
        if self.plan.two_passes:  # only these methods tell linear weights from others
            self.kinds = kinds(self.plan.reference, tensors)
        else:
            self.kinds = Kinds({n: kind_by_name(t) or Kind.OTHER for n, t in tensors.items()}, "names")

    def run(self) -> dict[str, dict[str, Any]]:
        """Merge all tensors that the journal lacks; return the journal, one entry per task.

        Raises:
            InputError: a NaN or Inf, a file that changed or ended while it was read.
            ResourceError: memory or disk ran out.
        """
        self._forget_damaged()
        with explain_out_of_memory("fewer --workers, or --device cpu; the same command goes on where this one stopped"):
            if self.plan.two_passes:
                self._two_passes()
            else:
                tasks = self._tasks(MERGE, [*self.plan.merged, *self.plan.copied])
                self._pass("merging", tasks, self._merge_elements)
                if self.plan.method.onto_weight is not None:
                    self.numbers = {"models": float(len(self.plan.models) + max(0, self.plan.earlier - 1))}
        return self.output.finished

    # The passes -------------------------------------------------------------------------------------------------------

    def _two_passes(self) -> None:
        self._pass("merging", self._tasks(MERGE, self.plan.merged), self._merge_task_vectors)
        entries = [self.output.finished[f"{MERGE}:{name}"] for name in self.plan.merged]
        new = range(1 if self.plan.history else 0, len(self.plan.models))
        # fsum is exact, so the order in which workers finished cannot show.
        self.numbers = self._task_vector_merge.scale(
            Norms(
                task_vectors=[math.sqrt(math.fsum(max(e["gram"][i][i], 0.0) for e in entries)) for i in new],
                merged=math.sqrt(math.fsum(e["merged"] for e in entries)),
                history=self.plan.history,
            )
        )
        if self.plan.adapter_rank is not None:
            touched = [name for name in self.plan.merged if any(name in v.modules for v in self.plan.views)]
            self._pass("writing", self._tasks(WRITE, touched, self._merged), self._write_factors)
        else:
            everything = [*self.plan.merged, *self.plan.copied]
            self._pass("writing", self._tasks(WRITE, everything, self._merged), self._write_sum)

    @property
    def _task_vector_merge(self) -> TaskVectorMerge:
        method: TaskVectorMerge = self.plan.method.implementation(self.plan.values)
        return method

    def _tasks(
        self, stage: str, names: list[str], further: Callable[[str], tuple[Any, ...]] = lambda name: ()
    ) -> list[Task]:
        """Return what the journal does not have; `further` arguments follow each tensor's name."""
        tensors, block = self.plan.reference.tensors, block_elements(self.device.type)
        tasks = [
            Task(f"{stage}:{name}", tensors[name].nbytes, workspace(self.plan, name, block), (name, *further(name)))
            for name in names
        ]
        return in_batches(tasks, self._batch_key, device=self.device, done=self.output.finished)

    def _batch_key(self, task: Task) -> Hashable | None:
        """Return what tensors have in common whose task vectors are decomposed as a batch."""
        name = task.arguments[0]
        decomposed = task.key.startswith(MERGE) and is_decomposed(self.plan, name)
        if not decomposed or self._task_vector_merge.elementwise(self.kinds.by_name[name]):
            return None
        return tuple(sorted(self.plan.reference.tensors[name].shape))

    def _merged(self, name: str) -> tuple[str | None, float]:
        """Return what the second pass takes of the first: a tensor's merged task vector (None for zero), the scale."""
        return self.output.finished.get(f"{MERGE}:{name}", {}).get("scratch"), self.numbers["scale"]

    def _pass(self, what: str, tasks: list[Task], do: Callable[..., dict[str, Any]]) -> None:
        self.engine.run_tasks(tasks, do, self._record, progress=self.progress, what=what)

    def _forget_damaged(self) -> None:
        """Forget what is finished by the journal but whose bytes did not reach the disk (a machine that lost power)."""
        self.output.forget_damaged()
        for key, entry in list(self.output.finished.items()):
            stage, _, name = key.partition(":")
            needed = stage == MERGE and "scratch" in entry and f"{WRITE}:{name}" not in self.output.finished
            if needed and file_digest(self.output.scratch / entry["scratch"]) != entry["scratch_digest"]:
                del self.output.finished[key]

    # One tensor -------------------------------------------------------------------------------------------------------

    def _merge_elements(self, name: str) -> dict[str, Any]:
        """Merge one tensor with a function transform, a block of rows at a time where the method allows."""
        if name in self.copied:
            return self._copy(name)
        plan, read = self.plan, self._reader(name)
        hasher = hashlib.sha256()
        grams: Tensor | None = None
        base_square = 0.0
        values, weights = plan.choice(name)
        shared = {"weights": weights, "seed": seed_for(plan.settings.seed, name), "earlier": plan.earlier}
        blocks = Blocks(read.shape, read.merge_blocks)
        measured = plan.method.find_numbers(values, {**shared, "blocks": blocks})
        for block in blocks:
            base, others = block.base, block.others
            available = {**shared, "measured": measured, "base": base, "others": others, "start": block.start}
            merged = plan.method.call(values, available)
            if merged.shape != others[0].shape:  # it would run over its neighbours in the file
                raise BasisError(
                    f"{plan.method.name} made {list(merged.shape)} of tensors of shape {list(others[0].shape)}",
                    tensor=name,
                    remedy="a merge method returns a tensor of its inputs' shape; report this to its author",
                )
            if base is not None:
                part = gram([x.reshape(-1) for x in [*others, merged]], origin=base.reshape(-1))
                grams = part if grams is None else grams + part
                base_square += inner(base, base)
            hasher.update(self._write(name, merged, block.rows))
            del block, base, others, available, merged  # before the next is read
        entry: dict[str, Any] = {"digests": {name: hasher.hexdigest()}, "inputs": read.digests()}
        if grams is not None:
            entry |= {"gram": grams[:-1, :-1].tolist(), "merged": float(grams[-1, -1]), "base": base_square}
        return entry

    def _merge_task_vectors(self, name: str) -> dict[str, Any]:
        """Merge the task vectors of one tensor and keep the result as scratch."""
        method = self._task_vector_merge
        kind, shape = self.kinds.by_name[name], self.plan.reference.tensors[name].shape
        file = self.output.scratch / f"{digest([name.encode()])[:32]}.safetensors"
        read = self._reader(name)
        entry: dict[str, Any] = {"merged": 0.0}
        if method.elementwise(kind) and not read.in_factors:
            spec = TensorSpec("dense", read.dtype, shape)
            blocks = self._merge_blocks(method, name, read, entry)
            return {"scratch_digest": write_file(file, [spec], blocks), "scratch": file.name} | entry
        entry["gram"] = read.statistics().tolist()
        entry["inputs"] = read.digests()
        vectors = TaskVectors(name, kind, shape, read.weight_norm, self._reader(name).task_vectors)
        merged, details = method.merge(vectors)
        entry |= details
        if merged is None:
            return entry
        entry["merged"] = inner(merged, merged)
        parts = {"b": merged.b, "a": merged.a} if isinstance(merged, LowRank) else {"dense": merged}
        specs = [
            TensorSpec(key, "F64" if p.dtype == torch.float64 else "F32", tuple(p.shape)) for key, p in parts.items()
        ]
        return entry | {"scratch_digest": write_file(file, specs, parts.values()), "scratch": file.name}

    def _merge_blocks(
        self, method: TaskVectorMerge, name: str, read: TensorReader, entry: dict[str, Any]
    ) -> Iterator[Tensor]:
        """Yield S in blocks of rows, for kinds of tensors where the method works element by element."""
        grams = read.zero_gram()
        for rows in read.blocks():
            differences = read.differences(rows, read.base(rows))
            grams += gram([difference.reshape(-1) for difference in differences])
            weighted = [d * w if w != 1.0 else d for d, w in zip(differences, read.factors, strict=True)]
            vectors = TaskVectors(name, self.kinds.by_name[name], weighted[0].shape, 0.0, lambda w=weighted: iter(w))  # type: ignore[misc]
            merged, _ = method.merge(vectors)
            assert isinstance(merged, Tensor)  # dense in, dense out
            entry["merged"] += inner(merged, merged)
            yield merged
        entry |= {"gram": grams.tolist(), "inputs": read.digests()}

    def _write_sum(self, name: str, merged: str | None, scale: float) -> dict[str, Any]:
        """Write base + scale · S for one tensor; `merged` is the scratch file of S."""
        if name in self.copied:
            return self._copy(name)
        reference = self.plan.reference.tensors[name]
        hasher, read, base_square = hashlib.sha256(), self._reader(name), 0.0
        with self._scratch(merged) as scratch:
            if scratch is None and self.plan.layout.tensors[name].dtype == reference.dtype:
                return self._copy(name)
            low_rank = None
            if scratch is not None and "a" in scratch.tensors:
                low_rank = _read_low_rank(scratch, reference.shape).to(self.device)
            for rows in read.blocks():
                total = read.base(rows)  # checked and digested: a merge of adapters has not read it before
                base_square += inner(total, total)
                if low_rank is not None:
                    total = total + low_rank.dense(rows) * scale
                elif scratch is not None:
                    total = total + read_to(self.device, scratch, "dense", rows) * scale
                hasher.update(self._write(name, total, rows))
        return {"digests": {name: hasher.hexdigest()}, "inputs": read.digests(), "base": base_square}

    def _write_factors(self, name: str, merged: str | None, scale: float) -> dict[str, Any]:
        """Write scale · S of one weight as the two factors of a LoRA adapter, balanced: B = U √σ, A = √σ Vᵀ."""
        view = next(view for view in self.plan.views if name in view.modules)
        key_a, key_b = factor_keys(view, name)
        specs = self.plan.layout.tensors
        a, b = torch.zeros(specs[key_a].shape), torch.zeros(specs[key_b].shape)
        with self._scratch(merged) as scratch:
            if scratch is not None:
                shape = self.plan.reference.tensors[name].shape
                u, sigma, vh = _read_low_rank(scratch, shape).scaled(scale).to(self.device).svd()
                if view.is_transposed(name):
                    u, vh = vh.mT, u.mT
                kept = min(len(a), sigma.numel())
                root = sigma[:kept].sqrt()
                b[:, :kept], a[:kept] = u[:, :kept] * root, root[:, None] * vh[:kept]
        digests = {key: digest([self._write(key, part, None)]) for key, part in ((key_a, a), (key_b, b))}
        return {"digests": digests}

    def _copy(self, name: str) -> dict[str, Any]:
        """Copy a tensor's bytes from the reference."""
        read, hasher = self._reader(name), hashlib.sha256()
        for rows in read.blocks():
            hasher.update(self.output.write(name, self.plan.reference.read(name, rows), rows.start if rows else 0))
        return {"digests": {name: hasher.hexdigest()}, "copied": True}

    # Helpers ----------------------------------------------------------------------------------------------------------

    def _write(self, name: str, values: Tensor, rows: slice | None) -> memoryview:
        """Round to the storage dtype (to nearest, ties to even), check, and write at the tensor's place."""
        stored = values.to(torch_dtype(self.plan.layout.tensors[name].dtype))
        if not (self.plan.settings.allow_nonfinite or is_finite(stored)):
            # Inputs were checked as they were read, so this came of the arithmetic or of the rounding.
            raise InputError(
                f"the merged values do not fit {self.plan.layout.tensors[name].dtype} (NaN or Inf)",
                file=self.plan.out,
                tensor=name,
                remedy="a wider --dtype (bf16 or f32), other parameters, or --allow-nonfinite",
            )
        return self.output.write(name, stored, rows.start if rows else 0)

    def _reader(self, name: str) -> TensorReader:
        return TensorReader(self.plan, name, self.device)

    @contextmanager
    def _scratch(self, file: str | None) -> Iterator[Checkpoint | None]:
        """Open the merged task vector of a tensor; None where it is zero."""
        if file is None:
            yield None
            return
        with closing(Checkpoint.open(Source("scratch", self.output.scratch / file))) as scratch:
            yield scratch

    def _record(self, key: str, entry: dict[str, Any]) -> None:
        """Journal a finished piece of work; only then may its scratch go."""
        self.output.record(key, entry)
        stage, _, name = key.partition(":")
        scratch = self.output.finished.get(f"{MERGE}:{name}", {}).get("scratch")
        if stage == WRITE and scratch:
            (self.output.scratch / scratch).unlink(missing_ok=True)


def _read_low_rank(scratch: Checkpoint, shape: tuple[int, ...]) -> LowRank:
    return LowRank(scratch.read("b"), scratch.read("a"), shape)
