"""The shape of a model's KV cache, and which models have one that can be compressed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from basiscli.checkpoints.source import Source
from basiscli.errors import InputError
from basiscli.runtime.export import AUTO_MAP

LEVELS = 8
"""Equal groups of a head's dimensions; a rank is a number of groups kept, 1 to 8 of 8."""
_PLAIN_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class KVShape:
    """The shape of a decoder's KV cache: for each token, keys and values of [layers, KV heads, head dimension]."""

    layers: int
    """Attention layers."""
    heads: int
    """KV heads."""
    dim: int
    """Dimensions of a head, the same for keys and values."""

    @property
    def levels(self) -> int:
        """Number of equal groups that a head's dimensions are divided into: 8, or the largest divisor below."""
        return LEVELS if self.dim % LEVELS == 0 else next(n for n in range(LEVELS, 0, -1) if self.dim % n == 0)

    @property
    def entries(self) -> tuple[int, int, int]:
        """Shape [layers, 2 (keys, values), KV heads] of tensors with one entry per head, such as ranks."""
        return self.layers, 2, self.heads

    def cache_bytes(self, element: int) -> int:
        """Return the bytes per token of the dense cache; `element` is the bytes of a number."""
        return self.layers * 2 * self.heads * self.dim * element


def kv_shape(source: Source) -> KVShape:
    """Return the shape of a model's KV cache from its `config.json`.

    Raises:
        InputError: the model has no KV cache or one that cannot be compressed; the message gives the reason.
    """
    config, file = source.config, source.folder / "config.json"
    if not config:
        raise InputError("no config.json beside the weights", file=file, remedy="give a complete model folder")
    if config.get("auto_map") not in (None, {}, AUTO_MAP):
        raise InputError(
            "the model brings its own code, which is not run",
            file=file,
            remedy="give a model of an architecture that transformers has",
        )
    nested = config.get("text_config")
    text: dict[str, Any] = nested if isinstance(nested, dict) else config
    names = config.get("architectures") or []
    reason = _no_cache(config, text, [str(name) for name in names] if isinstance(names, list) else [])
    if reason:
        raise InputError(
            f"{config.get('model_type', 'this model')}: {reason}",
            file=file,
            remedy="the KV cache of decoders with multi-head or grouped-query attention can be compressed",
        )
    try:
        layers, heads = int(text["num_hidden_layers"]), int(text["num_attention_heads"])
        kv_heads = int(text.get("num_key_value_heads") or heads)
        dim = int(text.get("head_dim") or int(text["hidden_size"]) // heads)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(
            f"the config does not say how large the KV cache is: {error}", file=file, remedy="give a complete config"
        ) from error
    if layers < 1 or kv_heads < 1 or dim < 2:
        raise InputError(
            f"a cache of {layers} layers, {kv_heads} KV heads of {dim} dimensions",
            file=file,
            remedy="give a complete config",
        )
    return KVShape(layers, kv_heads, dim)


def _no_cache(config: dict[str, Any], text: dict[str, Any], architectures: list[str]) -> str | None:
    """Return why there is no cache that can be compressed; None if there may be one."""
    if config.get("quantization_config"):
        return "the weights are quantised; give the unquantised checkpoint"
    if config.get("is_encoder_decoder"):
        return "encoder-decoder models have two caches, and neither is supported"
    if architectures and not any(
        name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in architectures
    ):
        return f"{architectures[0]} generates no text and has no KV cache"
    if text.get("kv_lora_rank"):
        return "multi-head latent attention (MLA) keeps one small latent a token already; there are no heads to project"
    if text.get("attn_logit_softcapping"):
        return "attention with soft-capped logits has no projected form in the fused kernels"
    if text.get("num_kv_shared_layers"):
        return "layers that share one cache are not supported"
    kinds = text.get("layer_types")
    other = {str(kind) for kind in kinds} - _PLAIN_LAYERS if isinstance(kinds, list) else set()
    if other:
        return f"layers of kind {', '.join(sorted(other))} keep something else than keys and values"
    return None
