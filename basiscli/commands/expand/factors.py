"""Trained factors (PiSSA, MiLoRA, OLoRA) as LoRA of the original model: s(BA − B₀A₀), of twice the rank."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from basiscli.checkpoints.adapter import Adapter
from basiscli.checkpoints.header import TensorSpec
from basiscli.checkpoints.source import Source
from basiscli.commands.expand.lora import ITS_START, PlainLoRA, original_model
from basiscli.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


class FactorsAsLoRA(PlainLoRA):
    """A' = [A; A₀] and B' = [B, −B₀] of the trained A, B and those that training began with."""

    def __init__(self, trained: Source, initial: Source, base: str | None) -> None:
        """Open two adapters.

        Args:
            trained: the adapter after training, on the residual.
            initial: the one that `basis init` made.
            base: name of the original model; None for the one in the report of the initial adapter.

        Raises:
            InputError: they are not LoRA, or not a training's end and beginning.
        """
        self.sources = [trained, initial]
        self._trained, self._initial = Adapter(trained), Adapter(initial)
        _check_pair(self._trained, self._initial)
        self._base = base
        self.modules = len(self._trained.modules)
        self._axes: dict[str, int] = {}
        """Along which rank lies, of every factor by name: 0 for A [r, in], 1 for B [out, r]."""
        self._starts: dict[str, str] = {}
        """What the initial adapter calls the same factor."""
        for module, factors in self._trained.modules.items():
            self._axes |= {factors.a: 0, factors.b: 1}
            start = self._initial.modules[module]
            self._starts |= {factors.a: start.a, factors.b: start.b}
        self.tensors = {name: self._spec(name) for name in self._trained.weights.tensors}

    def config(self) -> dict[str, Any]:
        """Return the trained adapter's with twice the rank and the same scaling: α grows by 2, with rsLoRA by √2."""
        own = self._trained.config
        factor = math.sqrt(2) if own.get("use_rslora") else 2
        return own | {
            "r": own.get("r", 8) * 2,
            "lora_alpha": own.get("lora_alpha", 8) * factor,
            "rank_pattern": {key: rank * 2 for key, rank in (own.get("rank_pattern") or {}).items()},
            "alpha_pattern": {key: alpha * factor for key, alpha in (own.get("alpha_pattern") or {}).items()},
            "init_lora_weights": True,
            "base_model_name_or_path": original_model(self.sources[1], self._base),
            "inference_mode": True,
        }

    def read(self, name: str) -> Tensor:
        """Return a factor beside its start, in the trained one's dtype; other tensors as they are."""
        import torch

        own = self._trained.weights.read(name)
        if name not in self._axes:
            return own
        axis = self._axes[name]
        start = self._initial.weights.read(self._starts[name]).to(own.dtype)
        return torch.cat([own, start if axis == 0 else -start], axis)

    def close(self) -> None:
        """Close the files of both adapters."""
        self._trained.weights.close()
        self._initial.weights.close()

    def _spec(self, name: str) -> TensorSpec:
        stored = self._trained.weights.tensors[name]
        shape = list(stored.shape)
        if name in self._axes:
            shape[self._axes[name]] *= 2
        return TensorSpec(name, stored.dtype, tuple(shape))


def _check_pair(trained: Adapter, initial: Adapter) -> None:
    """Refuse adapters that are not a training's end and beginning."""
    if trained.bias_deltas:
        raise InputError(
            "the adapter trains biases of its factors", file=trained.source.path, remedy="merge it instead"
        )
    for module in sorted(trained.modules.keys() ^ initial.modules.keys()):
        raise InputError(f"only one of the two adapters has {module}", file=initial.source.path, remedy=ITS_START)
    for module, factors in trained.modules.items():
        start = initial.modules[module]
        if factors.embedding or factors.scaling != start.scaling:
            what = (
                "an embedding's factors" if factors.embedding else f"scaling {factors.scaling:g} and {start.scaling:g}"
            )
            raise InputError(f"{module}: {what}", file=trained.source.path, remedy="give the adapter it began with")
        _check_factor(trained, factors.a, initial, start.a)
        _check_factor(trained, factors.b, initial, start.b)


def _check_factor(trained: Adapter, name: str, initial: Adapter, start: str) -> None:
    """Refuse a factor of another shape than its start, or of a dtype to which the start would have to be rounded."""
    found, expected = trained.weights.tensors[name], initial.weights.tensors[start]
    if found.shape != expected.shape:
        raise InputError(
            f"shapes differ: {list(found.shape)} trained, {list(expected.shape)} at the start",
            file=initial.source.path,
            tensor=start,
            remedy=ITS_START,
        )
    if found.dtype not in (expected.dtype, "F32"):
        raise InputError(
            f"the start is stored in {expected.dtype}, the trained adapter in {found.dtype}: rounding it would "
            "change what it subtracts",
            file=trained.source.path,
            tensor=name,
            remedy="save the trained adapter in float32, or as the start is stored",
        )
