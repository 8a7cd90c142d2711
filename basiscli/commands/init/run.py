"""Running an initialisation: a weight at a time becomes two factors and what they leave."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from basiscli.calibration.tokens import Windows, read_windows
from basiscli.checkpoints.digests import digest
from basiscli.checkpoints.dtypes import raw_bytes, torch_dtype
from basiscli.checkpoints.header import TensorSpec
from basiscli.checkpoints.scratch import write_file
from basiscli.checkpoints.source import Source
from basiscli.checkpoints.tinylora import selectors
from basiscli.checkpoints.transfer import read_to
from basiscli.checkpoints.views import Checkpoint
from basiscli.checkpoints.writer import PartialOutput
from basiscli.commands.init.plan import NF4_ROUNDS, InitPlan
from basiscli.engine.batches import in_batches
from basiscli.engine.copying import copy_tensor
from basiscli.engine.devices import within_memory
from basiscli.engine.tasks import Engine, Task
from basiscli.engine.threads import Threads
from basiscli.errors import BasisError, InputError
from basiscli.linalg.finite import is_finite
from basiscli.linalg.lowrank import LowRank
from basiscli.linalg.nf4 import nf4_rounded, quantised_start
from basiscli.linalg.nola import factor_bases
from basiscli.linalg.svd import SVD, captured
from basiscli.model.moments import MomentsRun
from basiscli.model.stored_moments import StoredMoments
from basiscli.names import seed_for
from basiscli.progress import PartOf, Progress
from basiscli.runtime.load import load_tokenizer
from basiscli.transforms import DataInit, InputMoments

_COPY_WORKSPACE = 1 << 25
_SPECTRUM = 32  # singular values a weight that the report keeps


@dataclass
class InitRun:
    """One run of a plan into its partial output."""

    plan: InitPlan
    output: PartialOutput
    progress: Progress
    device: torch.device
    engine: Engine
    windows: Windows | None = None
    """The calibration text, once it is read."""
    ranks: dict[str, int] = field(default_factory=dict)
    """Of every weight, once they are known; 0 for one without factors."""

    def run(self) -> dict[str, dict[str, Any]]:
        """Do what the journal does not have; return the journal, one entry a weight.

        Raises:
            InputError: a NaN or Inf, a file that changed while it was read, calibration that cannot be used.
            ResourceError: memory or disk ran out.
        """
        plan = self.plan
        with within_memory("fewer --workers, or --device cpu; the same command goes on where this one stopped"):
            if plan.method.shares_ranks:
                self._from_data()
            elif plan.energy is not None:
                self._by_energy()
            else:
                self.ranks = dict.fromkeys(plan.targets, plan.rank)
                self._drop_unwritten()
                if plan.calibration is not None:
                    self._layer_by_layer()
                names = [*([] if plan.calibration else plan.targets), *plan.copied]
                self._do(self._tasks(names), self._make)
        return self.output.finished

    # Ways through the weights -----------------------------------------------------------------------------------------

    def _layer_by_layer(self) -> None:
        """Decompose each weight while the moments of its inputs are there."""
        if self.output.finished.keys() >= self.plan.targets.keys():
            self.windows = self._read_windows()  # the report tells of them
            return
        reached = set()
        for moments in self._moments():
            found = [name for name, module in self.plan.targets.items() if module in moments]
            reached |= {*found}
            tasks = self._tasks(found, lambda name, of=moments: of[self.plan.targets[name]])  # type: ignore[misc]
            near = self._local_engine
            near.run_tasks(tasks, self._decompose, self.output.record, progress=PartOf(self.progress), what="")
        for name in self.plan.targets:
            if name not in reached:
                raise InputError(
                    "no calibration token reaches this layer",
                    tensor=name,
                    remedy="leave it out with --target-modules",
                )

    def _by_energy(self) -> None:
        """Decompose all weights into scratch files, then write the adapter, whose shapes are known only then."""
        for name, entry in list(self.output.finished.items()):  # what did not reach the disk is done again
            if entry["rank"] and self._scratch_digest(name) != entry["scratch"]:
                del self.output.finished[name]
        self._do(self._tasks(self.plan.targets), self._cut)
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
                with closing(Checkpoint.open(Source("factors", self._scratch(name)))) as stored:
                    a, b = stored.read("a"), stored.read("b")
                    self.output.record(name, self.output.finished[name] | self._write_factors(name, b, a))

    def _from_data(self) -> None:
        """Collect directions of every target's inputs, share out the ranks, and write A with B = 0."""
        plan = self.plan
        offers: dict[str, tuple[Tensor, Tensor]] = {}
        for moments in self._moments():
            readers: dict[StoredMoments, list[str]] = {inputs: [] for inputs in moments.values()}
            for name, module in plan.targets.items():
                if module in moments:
                    readers[moments[module]].append(name)
            for inputs, names in readers.items():
                self._refuse_few_tokens(names[0], inputs.count)
            tasks = [
                Task(names[0], 0, plan.workspace(names[0]), (names[0], inputs)) for inputs, names in readers.items()
            ]
            made: dict[str, dict[str, Any]] = {}
            near = self._local_engine
            tasks = in_batches(tasks, self._alike, device=self.device, done=())
            near.run_tasks(tasks, self._directions, made.__setitem__, progress=PartOf(self.progress), what="")
            for names in readers.values():
                offers |= dict.fromkeys(names, (made[names[0]]["rows"], made[names[0]]["scores"]))
        self.ranks = shared_ranks({n: offers[n][1] if n in offers else torch.zeros(0) for n in plan.targets}, plan.rank)
        self.output.allocate(plan.layout_of(self.ranks))
        for name, rank in self.ranks.items():
            entry: dict[str, Any] = {"rank": rank, "energy": 0.0, "digests": {}}
            if rank:
                rows, scores = offers[name]
                b = torch.zeros(plan.linear_shape(name)[0], rank)
                entry |= {"energy": float(scores[:rank].sum()), "spectrum": _rounded(scores[:rank])}
                entry |= self._write_factors(name, b, rows[:rank])
            self.output.record(name, entry)
        unreached = [name for name in plan.targets if name not in offers]
        if unreached:
            plan.notes.append(f"{len(unreached)} modules get no input and no factors, such as {unreached[0]}")

    def _offered(self, name: str) -> int:
        """Return how many directions a weight's inputs are to offer."""
        method: DataInit = self.plan.method.implementation(self.plan.values)
        return min(method.offered(self.plan.rank), self.plan.linear_shape(name)[1])

    def _refuse_few_tokens(self, name: str, count: int) -> None:
        if count <= self._offered(name):
            raise InputError(
                f"{count} calibration tokens reach this layer, too few for {self._offered(name)} directions",
                file=self.plan.calibration.place if self.plan.calibration else None,
                tensor=name,
                remedy="give more text with --calibration, more --tokens, or a smaller --rank",
            )

    def _directions(self, name: str, stored: StoredMoments) -> dict[str, Tensor]:
        """Return what a method offers for a weight and all that read the same: `rows` of A, and their `scores`."""
        plan, inputs = self.plan, stored.load(self.device)
        method: DataInit = plan.method.implementation(plan.values)
        wanted = self._offered(name)
        rows, scores = method.directions(inputs, wanted, SVD(plan.exact, seed_for(plan.settings.seed, name)))
        if (
            rows.shape != (wanted, plan.linear_shape(name)[1])
            or len(scores) != wanted
            or not (is_finite(rows) and is_finite(scores))
        ):
            raise BasisError(
                f"{plan.method.name} made directions of {list(rows.shape)} with {len(scores)} scores, or NaN",
                tensor=name,
                remedy="`directions` returns A [count, in] and scores [count]; report this to the method's author",
            )
        return {"rows": rows.cpu().float(), "scores": scores.cpu()}  # they wait until the ranks are known

    def _moments(self) -> Iterator[dict[str, StoredMoments]]:
        """Run the calibration text through the model; see `MomentsRun.moments`."""
        self.windows = self._read_windows()
        return MomentsRun(self.plan, self.output, self.progress, self.device, self._local_engine).moments(self.windows)

    @property
    def _local_engine(self) -> Engine:
        """What does tasks that hand tensors on: on a GPU one thread, since streams do not wait for each other."""
        if isinstance(self.engine, Threads) and self.device.type == "cuda":
            return Threads(1, notes=self.engine.notes)
        return self.engine

    def _read_windows(self) -> Windows:
        given, model = self.plan.calibration, self.plan.model
        assert given is not None
        vocabulary = model.vocabulary_size or 1 << 62
        folder = model.source.folder
        windows = read_windows(given.place, lambda: load_tokenizer(folder), given.length, vocabulary)
        return windows.spread(max(1, given.tokens // windows.ids.shape[1]))

    # One weight -------------------------------------------------------------------------------------------------------

    def _make(self, name: str) -> dict[str, Any]:
        """Do what is planned for one tensor of the model."""
        if name not in self.plan.targets:
            allow = self.plan.settings.allow_nonfinite
            return {"digests": {name: copy_tensor(self.plan.model, self.output, name, allow_nonfinite=allow)}}
        return self._coefficients(name) if self.plan.trains_coefficients else self._decompose(name)

    def _decompose(self, name: str, stored_inputs: StoredMoments | None = None) -> dict[str, Any]:
        """Write the factors of one weight, and the weight without them.

        The residual is taken from the factors as they are stored, so that their rounding is in it and the sum is the
        weight again, to one rounding of the residual.
        """
        plan, inputs = self.plan, stored_inputs.load(self.device) if stored_inputs else None
        weight, read = self._weight(name)
        if plan.quantize:
            parts: Sequence[Tensor] = quantised_start(weight, lambda m: self._pair(name, m, inputs), rounds=NF4_ROUNDS)
        else:
            parts = self._parts(name, weight, inputs)
        factors = self._stored_factors(name, *parts)
        product = plan.scaling(plan.rank) * _multiplied(factors)
        rest = weight - product
        entry = self._facts(weight, rest, read) | {"rank": plan.rank, **self._write_stored(name, factors)}
        entry["spectrum"] = _spectrum(factors, plan.scaling(plan.rank))
        if plan.has_residual:
            stored = self._stored(name, rest.mT.contiguous() if plan.transposed else rest)
            entry["digests"][name] = digest([self.output.write(name, stored)])
            # Linear layers compute with [out, in], and quantise it row by row; a 4-bit load turns GPT-2's Conv1D first.
            base = stored.mT.contiguous() if plan.transposed else stored
            entry["error"] = float((base.to(weight) + product - weight).norm() / weight.norm().clamp_min(1e-30))
            if plan.quantize:
                entry |= _nf4_errors(weight, base, product)
        return entry

    def _coefficients(self, name: str) -> dict[str, Any]:
        """Write the coefficients that one module's training begins with."""
        plan, (rows, columns) = self.plan, self.plan.linear_shape(name)
        bases = factor_bases(
            plan.settings.seed, plan.targets[name], rank=plan.rank, count=plan.values.bases,  # type: ignore[attr-defined]
            in_features=columns, out_features=rows,
        )  # fmt: skip
        specs = plan.factors(name, plan.rank)
        stored = [
            self._stored(s.name, c)
            for s, c in zip(specs, plan.method.call(plan.values, {"random": bases}), strict=True)
        ]
        digests = {s.name: digest([self.output.write(s.name, c)]) for s, c in zip(specs, stored, strict=True)}
        return {"rank": plan.rank, "energy": 0.0, "digests": digests}

    def _pair(self, name: str, matrix: Tensor, inputs: InputMoments | None) -> tuple[Tensor, Tensor]:
        b, a = self._parts(name, matrix, inputs)
        return b, a

    def _parts(self, name: str, matrix: Tensor, inputs: InputMoments | None) -> tuple[Tensor, ...]:
        """Return what the method makes of a matrix [out, in]: (B, A), or (B, σ, A) where it trains values."""
        plan, rank = self.plan, self.plan.rank
        space = SVD(plan.exact, seed_for(plan.settings.seed, name))
        available = {"weight": matrix, "rank": rank, "svd": space, "inputs": inputs}
        parts = tuple(plan.method.call(plan.values, available))
        shapes = [(matrix.shape[0], rank), *([(rank,)] if plan.trains_values else []), (rank, matrix.shape[1])]
        fit = [part.shape for part in parts] == shapes
        if not (fit and all(is_finite(part) for part in parts)):
            found = " and ".join(str(list(part.shape)) for part in parts)
            what = f"factors of {found}" if not fit else "factors with NaN or Inf"
            wanted = "B [out, rank], σ [rank]" if plan.trains_values else "B [out, rank]"
            raise BasisError(
                f"{plan.method.name} made {what}",
                tensor=name,
                remedy=f"an init method returns {wanted} and A [rank, in]; report this to its author",
            )
        return parts

    def _cut(self, name: str) -> dict[str, Any]:
        """Keep of one difference what holds the energy that is wanted, in a scratch file."""
        plan = self.plan
        assert plan.energy is not None
        weight, read = self._weight(name)
        u, s, vh = captured(weight, plan.energy, plan.rank, SVD(plan.exact, seed_for(plan.settings.seed, name)))
        rest = weight - (u * s) @ vh
        root = s.sqrt()
        parts = [root[:, None] * vh, u * root]
        specs = [TensorSpec(key, "F32", tuple(part.shape)) for key, part in zip("ab", parts, strict=True)]
        if len(s):
            write_file(self._scratch(name), specs, parts)
        return self._facts(weight, rest, read) | {
            "rank": len(s),
            "spectrum": _rounded(s),
            "digests": {},
            "scratch": digest(map(raw_bytes, parts)),
        }

    def _facts(self, weight: Tensor, rest: Tensor, read: Mapping[str, str]) -> dict[str, Any]:
        total = float(weight.square().sum(dtype=torch.float64))
        left = float(rest.square().sum(dtype=torch.float64))
        return {"norm": total**0.5, "energy": 1 - left / total if total else 1.0, "inputs": read}

    def _write_factors(self, name: str, b: Tensor, a: Tensor) -> dict[str, Any]:
        return self._write_stored(name, self._stored_factors(name, b, a))

    def _stored_factors(self, name: str, b: Tensor, *rest: Tensor) -> list[Tensor]:
        """Return what the adapter holds for a method's (B, A) or (B, σ, A), as `InitPlan.factors` lists it.

        A and B times the scaling are b @ a; A alone keeps its size where B is zero. All in the storage dtype.
        """
        *values, a = rest
        root = 1.0 if self.plan.method.shares_ranks else self.plan.scaling(len(a)) ** 0.5
        key_a, key_b, *others = (spec.name for spec in self.plan.factors(name, len(a)))
        stored = [self._stored(key_a, a / root), self._stored(key_b, b / root)]
        return [*stored, selectors(len(a)), self._stored(others[1], values[0])] if values else stored

    def _write_stored(self, name: str, factors: Sequence[Tensor]) -> dict[str, Any]:
        specs = self.plan.factors(name, len(factors[0]))
        digests = {s.name: digest([self.output.write(s.name, x)]) for s, x in zip(specs, factors, strict=True)}
        return {"digests": digests}

    def _weight(self, name: str) -> tuple[Tensor, dict[str, str]]:
        """Return the matrix to decompose, float32 [out, in] on the device, and digests of what was read."""
        plan, read = self.plan, {}
        parts = []
        for place, checkpoint in enumerate(filter(None, (plan.model, plan.base))):
            hasher = hashlib.sha256()
            parts.append(read_to(self.device, checkpoint, name, seen=hasher.update).float())
            read[str(place)] = hasher.hexdigest()
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
        dtype = self.output.layout.tensors[name].dtype
        stored = values.to(torch_dtype(dtype)).contiguous()
        if not is_finite(stored):
            raise InputError(f"the values do not fit {dtype}", tensor=name, remedy="a wider --dtype (bf16 or f32)")
        return stored

    # Tasks ------------------------------------------------------------------------------------------------------------

    def _do(self, tasks: Sequence[Task], do: Callable[[str], dict[str, Any]]) -> None:
        self.engine.run_tasks(tasks, do, self.output.record, progress=self.progress, what=self.plan.method.name)

    def _tasks(self, names: Iterable[str], inputs: Callable[[str], StoredMoments] | None = None) -> list[Task]:
        """Return what the journal does not have; what a weight's `inputs` cost has been counted."""
        plan, tensors = self.plan, self.plan.model.tensors
        tasks = [
            Task(
                name,
                0 if inputs else tensors[name].nbytes,
                plan.workspace(name) if name in plan.targets else _COPY_WORKSPACE,
                (name, inputs(name)) if inputs else (name,),
            )
            for name in names
        ]
        return in_batches(tasks, self._alike, device=self.device, done=self.output.finished)

    def _alike(self, task: Task) -> Hashable | None:
        """Return what weights have in common that are decomposed as a batch, or whose inputs are."""
        plan, name = self.plan, task.key
        if name not in plan.targets or plan.trains_coefficients:
            return None
        return plan.linear_shape(name)[1] if plan.calibration else tuple(sorted(plan.linear_shape(name)))

    def _drop_unwritten(self) -> None:
        """Forget what the journal says is finished and the disk does not have: it is done again."""
        for name, entry in list(self.output.finished.items()):
            if any(self.output.digest_on_disk(key) != sha for key, sha in entry["digests"].items()):
                del self.output.finished[name]

    def _scratch(self, name: str) -> Path:
        return self.output.scratch / f"{self.plan.places[name]}.safetensors"

    def _scratch_digest(self, name: str) -> str:
        try:
            with closing(Checkpoint.open(Source("factors", self._scratch(name)))) as stored:
                return digest(raw_bytes(stored.read(key)) for key in "ab")
        except BasisError:
            return ""


def _multiplied(factors: Sequence[Tensor]) -> Tensor:
    """Return B A, or B diag(σ) A, in float32, of factors as `_stored_factors` returns them."""
    product = _low_rank(factors)
    return product.b @ product.a


def _low_rank(factors: Sequence[Tensor]) -> LowRank:
    a, b, *values = (factor.float() for factor in factors if factor.dim() < 3)
    return LowRank(b * values[0] if values else b, a, (len(b), a.shape[1]))


def _spectrum(factors: Sequence[Tensor], scaling: float) -> list[float]:
    """Return the first singular values of what the factors add to the residual."""
    _, sigma, _ = _low_rank(factors).svd()
    return _rounded(sigma * scaling)


def _rounded(values: Tensor) -> list[float]:
    """Return the first values with as many digits as a picture can show."""
    return [float(f"{value:.6g}") for value in values[:_SPECTRUM].tolist()]


def _nf4_errors(weight: Tensor, base: Tensor, product: Tensor) -> dict[str, float]:
    """Return the Frobenius norms of what NF4 takes from the base with its adapter, and from the weight itself (QLoRA).

    Both are rounded as they are stored: what a 4-bit load computes with.
    """
    return {
        "nf4_error": float((nf4_rounded(base).to(weight) + product - weight).norm()),
        "nf4_error_qlora": float((nf4_rounded(weight.to(base)).to(weight) - weight).norm()),
    }


def shared_ranks(scores: Mapping[str, Tensor], rank: int) -> dict[str, int]:
    """Return how many of its scores each name has among the best rank · names of all.

    Equal scores go to the earlier name: modules that read the same input come out with equal ranks, up to one.
    """
    budget = rank * len(scores)
    order = [(-float(score), place, name) for name, own in scores.items() for place, score in enumerate(own.tolist())]
    order.sort(key=lambda entry: entry[:2])  # stable: names in their order
    ranks = dict.fromkeys(scores, 0)
    for _, _, name in order[:budget]:
        ranks[name] += 1
    return ranks
