"""Putting the bases of the values into the weights, where attention lets them through unchanged.

W_v ← U_Vᵀ W_v (its bias, too) and W_o ← W_o U_V: attention weighs values and adds them up, which commutes with a
rotation of each head's dimensions. The folded model is the dense model in other coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from basiscli.checkpoints.views import Checkpoint
from basiscli.commands.kv.shape import KVShape
from basiscli.errors import InputError


@dataclass(frozen=True)
class Fold:
    """Where one layer's values and outputs are in the weights."""

    layer: int
    module: str
    """The attention module's name."""
    shape: KVShape
    group: int
    """Query heads a KV head."""
    fused: bool
    """Queries, keys and values come of one projection, in this order."""
    changed: str | None
    """What is done to values after their projection, if anything: then nothing can be folded."""

    @property
    def _value(self) -> str:
        return f"{self.module}.qkv_proj" if self.fused else f"{self.module}.v_proj"

    def weights(self, checkpoint: Checkpoint) -> list[str]:
        """Return the tensors that change.

        Raises:
            InputError: if the checkpoint has other names, or attention does not commute with a rotation of values.
        """
        needed = [f"{self._value}.weight", f"{self.module}.o_proj.weight"]
        missing = [name for name in needed if name not in checkpoint.tensors]
        if missing or self.changed:
            raise InputError(
                f"values are {self.changed} after their projection" if self.changed else "no such weight",
                file=checkpoint.source.folder,
                tensor=needed[0] if self.changed else missing[0],
                remedy="leave out --fold-v",
            )
        bias = f"{self._value}.bias"
        return [*needed, *([bias] if bias in checkpoint.tensors else [])]

    def folded(self, name: str, stored: Tensor, bases: Tensor) -> Tensor:
        """Return a weight or bias with the values' bases [KV heads, d, d] folded in, in float64."""
        wide, turn = stored.double(), bases.double()
        heads, dim = self.shape.heads, self.shape.dim
        if name.startswith(f"{self.module}.o_proj"):
            split = wide.view(len(wide), heads, self.group, dim)
            return torch.einsum("ohgd,hde->ohge", split, turn).reshape(wide.shape)
        first = (heads * self.group + heads) * dim if self.fused else 0
        rows = wide[first : first + heads * dim]
        turned = torch.einsum("hde,hdi->hei", turn, rows.reshape(heads, dim, -1)).reshape(rows.shape)
        return torch.cat([wide[:first], turned, wide[first + heads * dim :]])

    def output_moments(self, model: Any) -> Tensor:
        """Return W_oᵀ W_o of each KV head's inputs [KV heads, d, d] in float64; the identity where there is no W_o."""
        projection = getattr(model.get_submodule(self.module), "o_proj", None)
        if not isinstance(projection, nn.Linear):
            return torch.eye(self.shape.dim, dtype=torch.float64).expand(self.shape.heads, -1, -1)
        weight = projection.weight.detach().float()
        split = weight.view(len(weight), self.shape.heads, self.group, self.shape.dim)
        rows = split.permute(1, 0, 2, 3).flatten(1, 2)
        return (rows.mT @ rows).double().cpu()


def folds_of(model: Any, modules: Sequence[nn.Module], shape: KVShape) -> list[Fold]:
    """Return where the values of each layer are."""
    names = {module: name for name, module in model.named_modules()}
    return [
        Fold(layer, names[module], shape, _group(module, shape), hasattr(module, "qkv_proj"), _changed(module))
        for layer, module in enumerate(modules)
    ]


def _changed(module: nn.Module) -> str | None:
    if hasattr(module, "v_norm"):
        return "normalised"
    return "clipped" if getattr(getattr(module, "config", None), "clip_qkv", None) is not None else None


def _group(module: nn.Module, shape: KVShape) -> int:
    projection = getattr(module, "o_proj", None)
    return projection.in_features // (shape.heads * shape.dim) if isinstance(projection, nn.Linear) else 1
