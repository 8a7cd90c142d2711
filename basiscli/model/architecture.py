"""Kinds of tensors: linear weight, embedding, norm, bias, convolution, buffer.

A known name decides, at no cost; that covers the checkpoints of all common families. Only where a matrix has an unknown
name is the config's own model built on the meta device, which imports transformers (seconds). `Kinds.found_by` tells
which of the two decided.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from basiscli.checkpoints.header import TensorSpec
from basiscli.model.names import parts_of
from basiscli.transforms import Kind

if TYPE_CHECKING:
    from basiscli.checkpoints.views import Checkpoint


@dataclass(frozen=True)
class Kinds:
    """The kind of every tensor of a checkpoint."""

    by_name: dict[str, Kind]
    found_by: Literal["names", "model"]
    """Whether tensor names alone decided, or the modules of the config's model."""


_LINEAR = re.compile(
    r"([qkvo]|qkv|q_lin|k_lin|v_lin|out_lin|lin1|lin2|query|key|value|dense|query_key_value|dense_h_to_4h|dense_4h_to_h"
    r"|(q|k|v|o|out|qkv|gate|up|down|gate_up|kv|q_a|q_b|kv_a|kv_b)_proj(_with_mqa)?|c_attn|c_proj|c_fc|fc_?[12]"
    r"|fc_(in|out)|w[123io]|wi_[01]|wqkv|attention_output|lm_head|embed_out|score|classifier|dense_layer)"
)
_EMBEDDING = re.compile(
    r"(wte|wpe|shared|embed_tokens|embed_positions|embed_in|word_embeddings|position_embeddings|token_type_embeddings"
    r"|tok_embeddings|relative_attention_bias|position_embedding|token_embedding)"
)
_NORM = re.compile(r".*(norm|ln|layernorm|layer_norm|ln_\w+|ln\d|norm\d)", re.IGNORECASE)
_BUFFER = re.compile(r".*(inv_freq|position_ids|masked_bias|attn\.bias|num_batches_tracked)")
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")
_WHOLE = {"model", "transformer", "gpt_neox", "backbone", "bert", "roberta", "distilbert", "electra", "lm_head", "cls"}
_QUANTISED = re.compile(r".*\.(weight|qweight|qzeros|weight_packed|absmax|g_idx)")


def layer_of(name: str) -> int | None:
    """Return the index of the layer that a tensor belongs to: 3 for `model.layers.3.…`; None outside the layers."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def with_layer(name: str, layer: int) -> str:
    """Return a tensor's name with another layer index: `model.layers.7.…` for `model.layers.3.…` and 7."""
    match = _LAYER.search(name)
    assert match is not None  # `layer_of` tells
    return f"{name[: match.start(1)]}{layer}{name[match.end(1) :]}"


def is_before_layers(name: str) -> bool:
    """Return whether a tensor outside the layers is used before them: embeddings and their norms."""
    module = name.rpartition(".")[0].rpartition(".")[2]
    return ("embed" in name and module != "embed_out") or module in {"wte", "wpe", "shared"}


def is_buffer(tensor: TensorSpec) -> bool:
    """Return whether a tensor is a buffer, which training does not change: position ids, masks, rotary frequencies."""
    # GPT-2's causal mask is `attn.bias`, four-dimensional; an attention bias of one dimension is a parameter.
    if tensor.name.endswith("attn.bias") and len(tensor.shape) < 2:
        return False
    return bool(_BUFFER.fullmatch(tensor.name))


def is_quantised_name(tensor: TensorSpec) -> bool:
    """Return whether an integer tensor's name is one of packed quantised weights (`qweight`, `qzeros`, …)."""
    return bool(_QUANTISED.fullmatch(tensor.name))


def kind_by_name(tensor: TensorSpec) -> Kind | None:
    """Return the kind that a tensor's name and shape imply; None for a matrix of an unknown name."""
    module, _, leaf = tensor.name.rpartition(".")
    last = module.rpartition(".")[2]
    if is_buffer(tensor):
        return Kind.BUFFER
    if len(tensor.shape) <= 1:
        if leaf == "bias" or leaf.endswith("_bias"):
            return Kind.BIAS
        return Kind.NORM if _NORM.fullmatch(last) or leaf in {"gamma", "beta"} else Kind.OTHER
    if len(tensor.shape) > 2:
        return Kind.CONV if leaf == "weight" else Kind.OTHER
    if _EMBEDDING.fullmatch(last):
        return Kind.EMBEDDING
    if leaf == "weight" and _LINEAR.fullmatch(last):
        return Kind.LINEAR
    return None


def kinds(checkpoint: Checkpoint, tensors: Mapping[str, TensorSpec]) -> Kinds:
    """Return the kind of every tensor: by names, and for unknown names by building the config's model."""
    named = {name: kind_by_name(tensor) for name, tensor in tensors.items()}
    unsettled = [name for name, kind in named.items() if kind is None]
    found_by: Literal["names", "model"] = "names"
    if unsettled:
        parts = parts_of(checkpoint)
        found_by = "names" if parts is None else "model"
        for name in unsettled:
            # Without a model a matrix counts as linear, as it nearly always is; what is no part of the model is not.
            named[name] = Kind.LINEAR if parts is None else parts[name].kind if name in parts else Kind.OTHER
    return Kinds({name: kind for name, kind in named.items() if kind is not None}, found_by)
