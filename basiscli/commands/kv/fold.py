"""Folding the values' bases into the weights W_v and W_o, after which they cost nothing at run time.

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
    """The weights of one layer that its values' bases are folded into, and how."""

    layer: int
    module: str
    """The attention module's name."""
    shape: KVShape
    group: int
    """Query heads per KV head."""
    fused: bool
    """Whether queries, keys and values have one projection, `qkv_proj`, in this order."""
    changed: str | None
    """How values are changed after their projection (`normalised`, `clipped`), which forbids folding; else None."""

    @property
    def _value(self) -> str:
        return f"{self.module}.qkv_proj" if self.fused else f"{self.module}.v_proj"

    def weights(self, checkpoint: Checkpoint) -> list[str]:
        """Return the names of the tensors that folding changes.

        Raises:
            InputError: the checkpoint lacks one, or attention does not commute with a rotation of values.
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
        """Return one of these tensors with the values' bases [KV heads, d, d] folded in, in float64."""
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
        """Return W_oᵀ W_o over each KV head's inputs, float64 [KV heads, d, d]; the identity without `o_proj`."""
        projection = getattr(model.get_submodule(self.module), "o_proj", None)
        if not isinstance(projection, nn.Linear):
            return torch.eye(self.shape.dim, dtype=torch.float64).expand(self.shape.heads, -1, -1)
        weight = projection.weight.detach().float()
        split = weight.view(len(weight), self.shape.heads, self.group, self.shape.dim)
        rows = split.permute(1, 0, 2, 3).flatten(1, 2)
        return (rows.mT @ rows).double().cpu()


def folds_of(model: Any, modules: Sequence[nn.Module], shape: KVShape) -> list[Fold]:
    """Return one `Fold` per layer, given the model and its attention modules in order."""
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
