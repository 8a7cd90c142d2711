"""Running a KV compression: statistics, training, search of the ranks, and the weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from basiscli.calibration.tokens import Windows, read_windows
from basiscli.checkpoints.digests import digest
from basiscli.checkpoints.dtypes import torch_dtype
from basiscli.checkpoints.kv_file import KVBases, KVConfig, read_kv_bases
from basiscli.checkpoints.writer import PartialOutput
from basiscli.commands.kv.attention import Projector
from basiscli.commands.kv.fold import Fold, folds_of
from basiscli.commands.kv.plan import KVPlan
from basiscli.commands.kv.search import GreedySearch, spectrum, uniform
from basiscli.commands.kv.statistics import KVStatistics
from basiscli.commands.kv.training import Training
from basiscli.engine.copying import BLOCK_ELEMENTS, copy_tensor
from basiscli.engine.devices import explain_out_of_memory, working_dtype
from basiscli.engine.tasks import Engine, Task
from basiscli.engine.threads import Threads
from basiscli.errors import InputError
from basiscli.linalg.finite import is_finite
from basiscli.linalg.orthogonal import orthogonality_error
from basiscli.progress import Progress
from basiscli.runtime.kv_projection import attach, attention_modules
from basiscli.runtime.load import load_tokenizer, load_weights
from basiscli.runtime.support import check_attention
from basiscli.transforms import AttentionMoments, KVCompression


@dataclass
class KVRun:
    """Runs the plan of a KV compression into its partial output."""

    plan: KVPlan
    output: PartialOutput
    progress: Progress
    device: torch.device
    engine: Engine
    """Runs the tasks of the statistics; the rest runs in this process."""
    release_engine: Callable[[], None]
    """Called after the engine's last task, since a cluster's workers hold a model each."""
    numbers: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    windows: Windows | None = None
    losses: list[float] = field(default_factory=list)
    vocabulary: int = 0

    def run(self) -> KVBases:
        """Return the bases and ranks, after writing the weights; an interrupted run resumes from its journal.

        Raises:
            InputError: attention that cannot be projected, calibration that cannot be used, weights that are missing.
            ResourceError: memory ran out.
        """
        folds = self._folds()
        with explain_out_of_memory("a smaller --batch or --length; the same command goes on where this one stopped"):
            found = self._find()
        started = time.monotonic()
        self._write_weights(found, folds)
        self.seconds["writing"] = time.monotonic() - started
        return found

    # Bases and ranks --------------------------------------------------------------------------------------------------

    def _find(self) -> KVBases:
        plan, folder = self.plan, self.plan.model.source.folder
        started = time.monotonic()
        model = load_weights(folder, working_dtype(self.device, plan.model.tensors.values()), self.device)
        _refuse_nonfinite(model, folder)
        self.vocabulary = model.config.get_text_config().vocab_size
        self.numbers["full_rank_error"] = check_attention(model, plan.shape, folder / "config.json")
        modules = attention_modules(model)
        self.seconds["loading"] = time.monotonic() - started
        bases, energy = self._bases(model, modules)
        self.numbers["orthogonality_error"] = orthogonality_error(bases)
        levels = self._levels(model, modules, bases, energy)
        ranks = (levels * (plan.shape.dim // plan.shape.levels)).tolist()
        earlier = plan.earlier
        config = KVConfig(
            method=earlier.method if earlier else plan.method.name,
            parameters=earlier.parameters if earlier else plan.values.model_dump(mode="json"),
            head_dim=plan.shape.dim,
            levels=plan.shape.levels,
            key_ranks=[layer[0] for layer in ranks],
            value_ranks=[layer[1] for layer in ranks],
            values_folded=plan.folds,
            trained_steps=earlier.trained_steps if earlier else plan.train_steps,
            trained_tokens=earlier.trained_tokens if earlier else plan.train_tokens,
        )
        return KVBases(config, bases, energy)

    def _bases(self, model: Any, modules: Sequence[nn.Module]) -> tuple[Tensor, Tensor]:
        """Return bases and the energy of their columns; those of the input, if it was compressed before."""
        plan, settings = self.plan, self.plan.settings
        if plan.earlier is not None:
            self.release_engine()
            earlier = read_kv_bases(plan.model.source.folder)
            return earlier.bases, earlier.energy
        started = time.monotonic()
        _, training = self._calibration()
        moments = self._moments(model, modules, training)
        self.release_engine()
        method: KVCompression = plan.method.implementation(plan.values)
        start = method.start(moments).to(self.device)
        self.seconds["statistics"] = time.monotonic() - started
        started = time.monotonic()
        bases = start.cpu()
        if plan.train_steps:
            projectors = [Projector() for _ in modules]
            attach(model, projectors)
            run = Training(
                model, projectors, method, start, training, plan.train_steps, settings.batch, plan.shape.levels,
                settings.seed, self.output.scratch / "training.safetensors",
            )  # fmt: skip
            bases = run.run(self.progress)
            self.losses = run.losses
        self.seconds["training"] = time.monotonic() - started
        both = torch.stack([moments.keys, moments.values], 1)
        wide = bases.double()
        return bases, ((both @ wide) * wide).sum(-2).float()  # uᵀ S u of every column

    def _calibration(self) -> tuple[Windows, Windows]:
        """Return the windows that decide in the search and those of the training, which have none in common."""
        plan, settings = self.plan, self.plan.settings
        length = settings.length
        if self.windows is None:
            folder = plan.model.source.folder
            self.windows = read_windows(settings.calibration, lambda: load_tokenizer(folder), length, self.vocabulary)
        held = min(settings.search_windows, len(self.windows) // 2)
        if not held:
            raise InputError(
                f"the calibration text gives one window of {length} tokens, and at least two are needed",
                file=settings.calibration,
                remedy="give more text with --calibration, or a smaller --length",
            )
        # Spread over the text, which may change its subject from beginning to end.
        indices = torch.arange(held) * (len(self.windows) // held)
        others = torch.ones(len(self.windows), dtype=torch.bool).index_fill(0, indices, False)
        return self.windows.select(indices), self.windows.select(others)

    def _moments(self, model: Any, modules: Sequence[nn.Module], windows: Windows) -> AttentionMoments:
        """Return second moments of queries, keys and values over a sample of the windows."""
        statistics = KVStatistics(self.plan, self.output, self.progress, self.device, self.engine, model)
        sums = statistics.moments(windows.spread(self.plan.settings.moment_windows))
        outputs = [fold.output_moments(model) for fold in folds_of(model, modules, self.plan.shape)]
        return AttentionMoments(sums["keys"], sums["values"], sums["queries"], torch.stack(outputs))

    def _levels(self, model: Any, modules: Sequence[nn.Module], bases: Tensor, energy: Tensor) -> Tensor:
        """Return the levels that the search finds; those of an interrupted run, if it had found them."""
        plan = self.plan
        shape, levels, budget = plan.shape.entries, plan.shape.levels, plan.budget
        if plan.settings.search == "spectrum":
            return spectrum(energy, levels, budget)
        if not plan.searches:
            return uniform(shape, levels, budget)
        done = self.output.finished.get("search")
        if done is None:
            held, windows = self._calibration()
            started = time.monotonic()
            projectors = [Projector() for _ in modules]
            attach(model, projectors)
            method: KVCompression = plan.method.implementation(plan.values)
            if plan.earlier and plan.earlier.values_folded:
                bases = _values_as_they_come(bases)
            search = GreedySearch(model, projectors, method, bases, windows, held, levels)
            starts = [uniform(shape, levels, budget), spectrum(energy, levels, budget)]
            found = search.run(starts, self.progress)
            done = {
                "levels": found.levels.tolist(),
                "rounds": search.rounds,
                "round_seconds": search.round_seconds / max(1, search.rounds),
                "loss": found.loss,
                "divergence": found.divergence,
            }
            self.seconds["searching"] = time.monotonic() - started
            self.output.record("search", done)
        self.seconds["a round of the search"] = done["round_seconds"]
        self.numbers |= {
            "search_rounds": done["rounds"],
            "search_loss": done["loss"],
            "search_kl": done["divergence"],
        }
        return torch.tensor(done["levels"])

    # Weights ----------------------------------------------------------------------------------------------------------

    def _folds(self) -> dict[str, Fold]:
        """Return the fold of each tensor that has one; called first, so that an error comes before the work."""
        plan = self.plan
        folds: dict[str, Fold] = {}
        if plan.settings.fold_values and not (plan.earlier and plan.earlier.values_folded):
            model = load_weights(plan.model.source.folder, torch.float32, torch.device("meta"))
            for fold in folds_of(model, attention_modules(model), plan.shape):
                folds |= dict.fromkeys(fold.weights(plan.model), fold)
        return folds

    def _write_weights(self, found: KVBases, folds: dict[str, Fold]) -> None:
        plan = self.plan
        tasks = [
            Task(name, tensor.nbytes, 4 * BLOCK_ELEMENTS, (name, folds.get(name), found))
            for name, tensor in plan.model.tensors.items()
            if name not in self.output.finished
        ]
        threads = Threads(plan.settings.workers)
        threads.run_tasks(tasks, self._write_tensor, self.output.record, progress=self.progress, what="writing")

    def _write_tensor(self, name: str, fold: Fold | None, found: KVBases) -> dict[str, Any]:
        read = self.plan.model
        if fold is None:
            return {"digests": {name: copy_tensor(read, self.output, name)}, "action": "copied"}
        values = fold.folded(name, read.read(name), found.bases[fold.layer, 1])
        stored = values.to(torch_dtype(self.plan.layout.tensors[name].dtype))
        return {"digests": {name: digest([self.output.write(name, stored)])}, "action": "rotated"}


def _refuse_nonfinite(model: Any, folder: Path) -> None:
    for name, parameter in model.named_parameters():
        if not is_finite(parameter):
            raise InputError("the weights have a NaN or Inf", file=folder, tensor=name, remedy="mend the checkpoint")


def _values_as_they_come(bases: Tensor) -> Tensor:
    """Return bases for a model whose values come in their basis already: the identity in place of theirs."""
    identity = torch.eye(bases.shape[-1]).expand_as(bases[:, 1])
    return torch.stack([bases[:, 0], identity], 1)
