"""A checkpoint made of layers of several: their tensors under new names, read from where they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from basiscli.checkpoints.header import StoredTensor
from basiscli.checkpoints.views import Checkpoint
from basiscli.errors import InputError
from basiscli.model.architecture import comes_first, layer_of, with_layer

_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")  # lists with one entry a layer


@dataclass(frozen=True)
class Stretch:
    """Layers of a checkpoint, from the first up to, and without, the last."""

    checkpoint: Checkpoint
    first: int
    last: int


def depth_of(checkpoint: Checkpoint) -> int:
    """Return how many layers a checkpoint has."""
    return 1 + max((layer for name in checkpoint.tensors if (layer := layer_of(name)) is not None), default=-1)


def stacked(stretches: Sequence[Stretch]) -> Checkpoint:
    """Return the checkpoint whose layers are those of the stretches, one after another.

    What comes before the layers is the first stretch's, what comes after them the last one's. The configuration is the
    first one's with the new number of layers.

    Raises:
        InputError: a stretch has layers that its checkpoint lacks.
    """
    tensors: dict[str, StoredTensor] = {}
    done = 0
    for stretch in stretches:
        depth = depth_of(stretch.checkpoint)
        if stretch.last > depth:
            raise InputError(
                f"layers {stretch.first} to {stretch.last} of a model of {depth} layers",
                file=stretch.checkpoint.source.path,
                remedy=f"a layer_range within [0, {depth}]",
            )
        for name, stored in stretch.checkpoint.tensors.items():
            layer = layer_of(name)
            if layer is None:
                ours = stretch is (stretches[0] if comes_first(name) else stretches[-1])
            else:
                ours = stretch.first <= layer < stretch.last
                name = with_layer(name, done + layer - stretch.first)
            if ours:
                tensors[name] = replace(stored, name=name)
        done += stretch.last - stretch.first
    first = stretches[0].checkpoint
    files = dict.fromkeys(file for stretch in stretches for file in stretch.checkpoint.files)
    return Checkpoint(first.source, files, tensors, _deeper(first.config, stretches, done))


def _deeper(config: dict[str, Any], stretches: Sequence[Stretch], depth: int) -> dict[str, Any]:
    """Return a configuration with another number of layers."""
    inner = config.get("text_config")
    if isinstance(inner, dict) and any(key in inner for key in _DEPTHS):
        return config | {"text_config": _deeper(inner, stretches, depth)}
    changed: dict[str, Any] = {key: depth for key in _DEPTHS if key in config}
    for key in _PER_LAYER:
        lists = [_per_layer(stretch, key) for stretch in stretches]
        if key in config and all(len(one) == s.last - s.first for one, s in zip(lists, stretches, strict=True)):
            changed[key] = [entry for one in lists for entry in one]
        elif config.get(key) is not None:
            changed[key] = None  # some model leaves it to its class's rule, and so does the result
    return config | changed


def _per_layer(stretch: Stretch, key: str) -> list[Any]:
    config = stretch.checkpoint.config
    found = (config.get("text_config") or config).get(key)
    return found[stretch.first : stretch.last] if isinstance(found, list) else []
