"""Running the compression of a LoRA adapter: a fit of each layer, then distillation of its logits, measured."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from basiscli.calibration.tokens import Windows, read_windows
from basiscli.checkpoints.digests import digest
from basiscli.checkpoints.packing import packed, rounding_variance, unpacked
from basiscli.checkpoints.writer import PartialOutput
from basiscli.commands.nola.distil import Distillation, Fidelity
from basiscli.commands.nola.plan import NolaModule, NolaPlan
from basiscli.engine.devices import explain_out_of_memory, working_dtype
from basiscli.engine.settings import default_workers
from basiscli.engine.threads import Threads
from basiscli.errors import GateFailed, InputError
from basiscli.linalg.finite import is_finite
from basiscli.linalg.lowrank import LowRank
from basiscli.linalg.nola import factor_bases
from basiscli.linalg.nola_fit import explained_share, fit
from basiscli.linalg.randbasis import RandomBases
from basiscli.model.moments import CalibrationTargets, MomentsRun
from basiscli.progress import Progress
from basiscli.runtime.load import load_tokenizer, load_weights

_MOMENT_TOKENS = 16384
_HELD_OUT = 8  # windows at most, and an eighth of all


@dataclass
class NolaRun:
    """Runs the plan of an adapter's compression into its partial output."""

    plan: NolaPlan
    output: PartialOutput
    progress: Progress
    device: torch.device
    coefficients: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Coefficients of A and of B by module, rounded as they are stored."""
    shares: dict[str, float] = field(default_factory=dict)
    """Explained share of each module's effect, after the layer-wise fit."""
    norms: dict[str, float] = field(default_factory=dict)
    """Norm of each module's effect: of ΔW, or of its output over the inputs' second moments."""
    measured: Fidelity | None = None
    """Of the result on held-out windows; None without a base."""
    before: Fidelity | None = None
    """The same after the layer-wise fit, where training followed."""
    losses: list[float] = field(default_factory=list)
    windows: Windows | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def layer_share(self) -> float:
        """Explained share of all modules' effects together."""
        whole = math.fsum(norm**2 for norm in self.norms.values())
        return math.fsum(self.shares[n] * self.norms[n] ** 2 for n in self.norms) / whole if whole else 1.0

    @property
    def fidelity(self) -> float:
        """Share of the adapter's effect that is kept: of its KL to the base, or without a base of ‖ΔW‖²."""
        return self.layer_share if self.measured is None else self.measured.share

    def run(self) -> None:
        """Find the coefficients, measure their fidelity, and write them.

        Raises:
            InputError: NaN or Inf in the adapter or the base, calibration that cannot be used.
            GateFailed: the fidelity is below `min_fidelity`.
            ResourceError: memory ran out.
        """
        with explain_out_of_memory("a smaller --bases, --batch or --length"):
            started = time.monotonic()
            if self.plan.base is None:
                self._fit_alone()
            else:
                self._fit_layers(self.plan.base)
            self.seconds["layers"] = time.monotonic() - started
            if self.plan.base is not None:
                self._distil()
        if self.fidelity < self.plan.settings.min_fidelity and not self.plan.settings.force:
            raise self._too_little()
        for module in self.plan.modules:
            specs = self.plan.specs(module)
            stored = [self._stored(c) for c in self.coefficients[module.name]]
            written = {s.name: digest([self.output.write(s.name, c)]) for s, c in zip(specs, stored, strict=True)}
            self.output.record(module.name, {"digests": written})

    def bases_of(self, module: NolaModule) -> tuple[RandomBases, RandomBases]:
        """Return the random bases of a module's A [r, in] and B [out, r]."""
        plan = self.plan
        return factor_bases(
            plan.settings.seed, module.name, rank=plan.rank, count=plan.bases,
            in_features=module.in_features, out_features=module.out_features,
        )  # fmt: skip

    # Layer by layer ---------------------------------------------------------------------------------------------------

    def _fit_alone(self) -> None:
        self.progress.start("fitting", len(self.plan.modules), sum(self._size(m) for m in self.plan.modules))
        for module in self.plan.modules:
            self._fit(module, None)
            self.progress.advance(self._size(module))

    def _fit_layers(self, base: Any) -> None:
        self.windows, (_, training) = self._read_windows(base)
        count = max(1, _MOMENT_TOKENS // training.ids.shape[1])
        by_name = {module.loaded: module for module in self.plan.modules}
        engine = Threads(1 if self.device.type == "cuda" else default_workers())
        run = MomentsRun(
            CalibrationTargets(base, {n: n for n in by_name}), self.output, self.progress, self.device, engine
        )
        for moments in run.moments(training.spread(count)):
            for name, stored in moments.items():
                inputs = stored.load(self.device)
                self._fit(by_name[name], (inputs.raw / max(1, inputs.count)).float())
        for name, module in by_name.items():
            if module.name not in self.coefficients:
                raise InputError(
                    "no calibration token reaches this layer", tensor=name, remedy="give more text with --calibration"
                )

    def _fit(self, module: NolaModule, metric: Tensor | None) -> None:
        target, bases = self._update(module), self.bases_of(module)
        found = fit(target, *bases, 1.0, metric, noise=rounding_variance(self.plan.bits))
        a, b = self.coefficients[module.name] = (self._rounded(found.a, module), self._rounded(found.b, module))
        # Of the coefficients as they are stored: rounding them is part of what is lost.
        product = LowRank(bases[1].combination(b), bases[0].combination(a), target.shape)
        self.shares[module.name], self.norms[module.name] = explained_share(target, product, metric)

    def _update(self, module: NolaModule) -> LowRank:
        """Return s·B·A of the LoRA, [out, in], on the device."""
        adapter, factors = self.plan.adapter, self.plan.adapter.modules[module.name]
        a, b = (adapter.parts.read(name).to(self.device).float() for name in (factors.a, factors.b))
        for name, factor in ((factors.a, a), (factors.b, b)):
            if not is_finite(factor):
                raise InputError(
                    "the factor holds NaN or Inf", file=adapter.weights.files[0], tensor=name,
                    remedy="give a sound adapter",
                )  # fmt: skip
        return LowRank(b * factors.scaling, a, (module.out_features, module.in_features))

    # On the logits ----------------------------------------------------------------------------------------------------

    def _distil(self) -> None:
        plan, settings = self.plan, self.plan.settings
        assert plan.base is not None and self.windows is not None
        started = time.monotonic()
        _, (held, training) = self._read_windows(plan.base)
        model = self._student(plan.base)
        work = Distillation(model, {m.loaded: self._update(m) for m in plan.modules}, self.device)
        self.measured = work.measure(held, self.progress)
        if settings.steps:
            self.before = self.measured
            model.train()
            work.train(
                training, steps=settings.steps, batch=settings.batch, rate=settings.learning_rate, seed=settings.seed,
                progress=self.progress,
            )  # fmt: skip
            model.eval()
            self._take(model)
            self.measured = work.measure(held, self.progress)
            self.losses = work.losses
        self.seconds["distilling"] = time.monotonic() - started

    def _student(self, base: Any) -> Any:
        """Return the base with a NOLA adapter whose coefficients are those of the layers."""
        from peft import get_peft_model

        from basiscli.runtime.nola import NolaConfig

        plan = self.plan
        model = load_weights(base.source.folder, working_dtype(self.device, base.tensors.values()), self.device)
        config = NolaConfig(
            r=plan.rank, num_bases=plan.bases, nola_alpha=plan.rank, seed=plan.settings.seed,
            target_modules=[module.loaded for module in plan.modules],
        )  # fmt: skip
        with warnings.catch_warnings():  # peft 0.21 asks for what transformers 5.23 renamed
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            student = get_peft_model(model, config).eval()
        with torch.no_grad():
            for module, layer in self._layers(student):
                for parameter, found in zip(layer, self.coefficients[module.name], strict=True):
                    parameter.copy_(found)
        return student

    def _take(self, model: Any) -> None:
        """Keep the trained coefficients as the file will hold them, and put those in the model."""
        with torch.no_grad():
            for module, layer in self._layers(model):
                found = tuple(self._rounded(c.detach().float(), module) for c in layer)
                self.coefficients[module.name] = (found[0], found[1])
                for parameter, stored in zip(layer, found, strict=True):
                    parameter.copy_(stored)

    def _layers(self, model: Any) -> Iterator[tuple[NolaModule, tuple[Any, Any]]]:
        inner = model.get_base_model()
        for module in self.plan.modules:
            layer = inner.get_submodule(module.loaded)
            yield module, (layer.nola_a["default"], layer.nola_b["default"])

    def _read_windows(self, base: Any) -> tuple[Windows, tuple[Windows, Windows]]:
        """Return the calibration text, and of it what measures and what is learned from."""
        settings, folder = self.plan.settings, base.source.folder
        vocabulary = base.vocabulary_size or 1 << 62
        whole = self.windows or read_windows(
            settings.calibration, lambda: load_tokenizer(folder), settings.length, vocabulary
        )
        held = min(_HELD_OUT, max(1, len(whole) // 8))
        if len(whole) < 2:
            raise InputError(
                f"the calibration text gives one window of {settings.length} tokens, and at least two are needed",
                file=settings.calibration,
                remedy="give more text with --calibration, or a smaller --length",
            )
        indices = torch.arange(held) * (len(whole) // held)
        others = torch.ones(len(whole), dtype=torch.bool).index_fill(0, indices, False)
        return whole, (whole.select(indices), whole.select(others))

    # Storage ----------------------------------------------------------------------------------------------------------

    def _stored(self, coefficients: Tensor) -> Tensor:
        found = coefficients.cpu()
        return found.half() if self.plan.bits == 16 else packed(found, self.plan.bits)

    def _rounded(self, coefficients: Tensor, module: NolaModule) -> Tensor:
        """Return coefficients as they are read back from the file."""
        found = unpacked(self._stored(coefficients), len(coefficients))
        if not is_finite(found):
            raise InputError("the coefficients do not fit 16 bits", tensor=module.name, remedy="--bits 8")
        return found.to(coefficients)

    def _size(self, module: NolaModule) -> int:
        return self.plan.rank * (module.in_features + module.out_features)

    def _too_little(self) -> GateFailed:
        floor = self.plan.settings.min_fidelity
        return GateFailed(
            f"{self.fidelity:.1%} of the adapter's effect survives, less than the {floor:.1%} asked for",
            file=self.plan.adapter.source.path,
            remedy="more --bases or --steps, another --rank, text like what the adapter is for; or --force",
        )


def numbers_of(run: NolaRun) -> Mapping[str, float]:
    """Return the numbers of a finished run for the report, by name."""
    plan, measured = run.plan, run.measured
    before = sum(t.count for t in plan.adapter.weights.tensors.values())
    bytes_before = sum(file.stat().st_size for file in plan.adapter.weights.files)
    found = {
        "tensors": float(len(plan.layout.tensors)),
        "modules": float(len(plan.modules)),
        "adapter_parameters": float(plan.coefficients),
        "parameters_kept": plan.coefficients / before,
        "bytes_kept": plan.layout.nbytes / bytes_before,
        "rank_least": float(plan.rank),
        "rank_most": float(plan.rank),
        "fidelity": run.fidelity,
        "energy": run.layer_share,
        "energy_least": min(run.shares.values()),
    }
    if measured is not None:
        found |= {
            "kl": measured.kl,
            "kl_base": measured.kl_base,
            "perplexity": measured.perplexity,
            "perplexity_lora": measured.perplexity_lora,
            "perplexity_base": measured.perplexity_base,
        }
    if run.before is not None:
        found["fidelity_layers"] = run.before.share
    return found
