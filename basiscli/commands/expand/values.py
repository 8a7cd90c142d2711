"""Trained singular values (SVFit) as LoRA of the original model: B diag(v − σ) A, of the same rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from basiscli.checkpoints.digests import stored_digest
from basiscli.checkpoints.header import TensorSpec
from basiscli.checkpoints.source import Source
from basiscli.checkpoints.tinylora import TrainedValues, selectors
from basiscli.commands.expand.lora import ITS_START, PlainLoRA, original_model
from basiscli.errors import InputError
from basiscli.reports.schema import read_report

if TYPE_CHECKING:
    from torch import Tensor


class ValuesAsLoRA(PlainLoRA):
    """A as it is, and B diag(v − σ), of the trained v and the σ that training began with: only these differ."""

    def __init__(self, trained: Source, initial: Source, base: str | None) -> None:
        """Open two adapters.

        Args:
            trained: the TinyLoRA adapter after training.
            initial: the one that `basis init` made, with its report.
            base: name of the original model; None for the one in that report.

        Raises:
            InputError: they are not of this form, or not a training's end and beginning.
        """
        self.sources = [trained, initial]
        self._trained, self._initial, self._base = TrainedValues(trained), TrainedValues(initial), base
        self._indices = _indices(self._initial)
        new, old = self._trained, self._initial
        if new.modules.keys() != old.modules.keys() or new.rank != old.rank:
            raise InputError("the two adapters have other modules or ranks", file=initial.path, remedy=ITS_START)
        self.modules = len(new.modules)
        self.tensors: dict[str, TensorSpec] = {}
        self._module_of: dict[str, str] = {}
        for module, stored in new.modules.items():
            for factor, name in zip("AB", (stored.a, stored.b), strict=True):
                spec = new.weights.tensors[name]
                lora = f"base_model.model.{module}.lora_{factor}.weight"
                self.tensors[lora] = TensorSpec(lora, spec.dtype, spec.shape)
                self._module_of[lora] = module

    def config(self) -> dict[str, Any]:
        """Return the configuration of plain LoRA with scaling 1."""
        own = self._trained.config
        return {
            "peft_type": "LORA",
            "task_type": own.get("task_type"),
            "base_model_name_or_path": original_model(self.sources[1], self._base),
            "target_modules": list(self._trained.modules),
            "r": self._trained.rank,
            "lora_alpha": self._trained.rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": bool(own.get("fan_in_fan_out")),
            "init_lora_weights": True,
            "inference_mode": True,
        }

    def read(self, name: str) -> Tensor:
        """Return A [r, in], or B diag(v − σ) [out, r] computed in float64, in the dtype in which A and B are stored."""
        module = self._module_of[name]
        stored, start = self._trained.modules[module], self._initial.modules[module]
        if name.endswith("lora_A.weight"):
            return self._unchanged(stored.a, self._initial.weights.read(start.a))
        b = self._unchanged(stored.b, self._initial.weights.read(start.b))
        self._unchanged(stored.p, selectors(self._trained.rank))
        return (b.double() * self._change(module)).to(b.dtype)

    def close(self) -> None:
        """Close the files of both adapters."""
        self._trained.weights.close()
        self._initial.weights.close()

    def _change(self, module: str) -> Tensor:
        """Return v − σ [r], float64."""
        index = self._indices[module]
        v, sigma = (x.weights.read(x.values[index]).double() for x in (self._trained, self._initial))
        return v - sigma

    def _unchanged(self, name: str, start: Tensor) -> Tensor:
        """Return a tensor of the trained adapter that must be what its training began with, in whatever dtype."""
        found = self._trained.weights.read(name)
        if found.shape != start.shape or not bool((found.double() == start.double()).all()):
            raise InputError(
                "more than the values differs from the start",
                file=self._trained.source.path,
                tensor=name,
                remedy=ITS_START,
            )
        return found


def _indices(initial: TrainedValues) -> dict[str, int]:
    """Return by which number PEFT's TinyLoRA knows each module: the initial report has them in that order.

    Raises:
        InputError: the report is missing, or not that of these weights.
    """
    folder = initial.source.path
    report = read_report(folder)
    known = {tensor.name: tensor.sha256 for tensor in report.tensors} if report else {}
    modules = list(report.adapter.modules) if report and report.adapter else []
    fits = {*modules} == initial.modules.keys()
    if not fits or any(stored_digest(initial.weights.tensors[v]) != known.get(v) for v in initial.values):
        raise InputError(
            "the adapter is not as `basis init` wrote it, or its report is not with it",
            file=folder,
            remedy=f"{ITS_START}, with its basis_report.json",
        )
    return {module: index for index, module in enumerate(modules)}
