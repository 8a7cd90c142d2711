"""Whether a model's attention can be projected: decided by running it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from basiscli.errors import InputError
from basiscli.runtime.caches import cache_of, given_cache
from basiscli.runtime.kv_projection import KVProjection, attach, attention_modules

_PROMPT = 12
_MOST = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


def check_attention(model: Any, shape: Any, file: Path) -> float:
    """Run a short prompt densely and at full rank in random bases, with a cache: both must give the same logits.

    At rank 1 the cache must hold no more than that.

    Args:
        model: on its device; it keeps the projection's attention.
        shape: what the configuration says of its cache (layers, heads, dim).
        file: to name in errors.

    Returns:
        The largest difference of logits, relative to the largest logit.

    Raises:
        InputError: another number of layers or heads than the configuration says, attention of the model's own making,
            different logits, or a cache that stays large.
    """
    ids = torch.arange(1, _PROMPT + 1, device=model.device)[None] % model.config.get_text_config().vocab_size
    dense = _logits(model, ids)
    modules = attention_modules(model)
    if len(modules) != shape.layers:
        raise _unsupported(f"{len(modules)} attention modules in a model of {shape.layers} layers", model, file)
    generator = torch.Generator().manual_seed(0)
    size = (2, shape.heads, shape.dim, shape.dim)
    full, least = [shape.dim] * shape.heads, [1] * shape.heads
    bases = [torch.linalg.qr(torch.randn(size, generator=generator))[0] for _ in modules]
    try:
        attach(model, [KVProjection(keys, values, full, full) for keys, values in bases])
        projected = _logits(model, ids)
        attach(model, [KVProjection(keys, values, least, least) for keys, values in bases])
        small = _takes_coefficients(model, ids[:, :2], modules, shape.heads)
    except (ValueError, RuntimeError, NotImplementedError, AttributeError, TypeError, KeyError) as error:
        raise _unsupported(str(error).splitlines()[0], model, file) from error
    difference = float((dense - projected).abs().max() / dense.abs().max().clamp_min(1e-6))
    if not difference <= _MOST.get(model.dtype, 1e-3):
        raise _unsupported(f"at full rank the logits differ by {difference:.2g} of their size", model, file)
    if not small:  # attention that gets its cache in another way would be right, and save nothing
        raise _unsupported("its cache does not take coefficients", model, file)
    return difference


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    """Return logits of a prompt in two parts, so that the second attends to the cache."""
    first = model(input_ids=ids[:, :-4], use_cache=True)
    second = model(input_ids=ids[:, -4:], use_cache=True, **given_cache(model, cache_of(first)))
    return torch.cat([first.logits, second.logits], 1).float()


@torch.no_grad()
def _takes_coefficients(model: Any, ids: Tensor, modules: Sequence[Any], width: int) -> bool:
    """Whether every layer's cache holds so many numbers a token, of keys and of values."""
    layers = cache_of(model(input_ids=ids, use_cache=True)).layers
    held = [layers[module.layer_idx] for module in modules]
    return all(x.shape[1] == 1 and x.shape[-1] == width for layer in held for x in (layer.keys, layer.values))


def _unsupported(reason: str, model: Any, file: Path) -> InputError:
    return InputError(
        f"the attention of {type(model).__name__} cannot be projected: {reason}",
        file=file,
        remedy="supported are decoders whose attention runs through transformers' attention interface",
    )
