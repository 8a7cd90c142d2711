"""Checkpoints stacked from layers of several others, whose tensors are read from the original files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from basiscli.checkpoints.header import StoredTensor
from basiscli.checkpoints.views import Checkpoint
from basiscli.errors import InputError
from basiscli.model.architecture import is_before_layers, layer_of, with_layer

_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")  # lists with one entry a layer


@dataclass(frozen=True)
class LayerRange:
    """Layers `first` to `last` − 1 of a checkpoint, as a mergekit `layer_range`."""

    checkpoint: Checkpoint
    first: int
    last: int


def layer_count(checkpoint: Checkpoint) -> int:
    """Return the number of layers of a checkpoint, by the names of its tensors."""
    return 1 + max((layer for name in checkpoint.tensors if (layer := layer_of(name)) is not None), default=-1)


def stack_layers(ranges: Sequence[LayerRange]) -> Checkpoint:
    """Return a checkpoint with the layers of all ranges, one after another.

    Tensors before the layers are the first range's, tensors after them the last one's. The configuration is the first
    one's with the new number of layers.

        stack_layers([LayerRange(a, 0, 24), LayerRange(b, 8, 32)])  # 48 layers

    Raises:
        InputError: a range has layers that its checkpoint lacks.
    """
    tensors: dict[str, StoredTensor] = {}
    done = 0
    for layers in ranges:
        depth = layer_count(layers.checkpoint)
        if layers.last > depth:
            raise InputError(
                f"layers {layers.first} to {layers.last} of a model of {depth} layers",
                file=layers.checkpoint.source.path,
                remedy=f"a layer_range within [0, {depth}]",
            )
        for name, stored in layers.checkpoint.tensors.items():
            layer = layer_of(name)
            if layer is None:
                ours = layers is (ranges[0] if is_before_layers(name) else ranges[-1])
            else:
                ours = layers.first <= layer < layers.last
                name = with_layer(name, done + layer - layers.first)
            if ours:
                tensors[name] = replace(stored, name=name)
        done += layers.last - layers.first
    first = ranges[0].checkpoint
    files = dict.fromkeys(file for layers in ranges for file in layers.checkpoint.files)
    return Checkpoint(first.source, files, tensors, _deeper(first.config, ranges, done))


def _deeper(config: dict[str, Any], ranges: Sequence[LayerRange], depth: int) -> dict[str, Any]:
    """Return a configuration with another number of layers."""
    inner = config.get("text_config")
    if isinstance(inner, dict) and any(key in inner for key in _DEPTHS):
        return config | {"text_config": _deeper(inner, ranges, depth)}
    changed: dict[str, Any] = {key: depth for key in _DEPTHS if key in config}
    for key in _PER_LAYER:
        lists = [_per_layer(layers, key) for layers in ranges]
        if key in config and all(len(one) == s.last - s.first for one, s in zip(lists, ranges, strict=True)):
            changed[key] = [entry for one in lists for entry in one]
        elif config.get(key) is not None:
            changed[key] = None  # some model leaves it to its class's rule, and so does the result
    return config | changed


def _per_layer(layers: LayerRange, key: str) -> list[Any]:
    config = layers.checkpoint.config
    found = (config.get("text_config") or config).get(key)
    return found[layers.first : layers.last] if isinstance(found, list) else []
