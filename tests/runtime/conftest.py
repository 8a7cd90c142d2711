"""Tiny random models of many architectures, ragged projections of them, and a slow reference of projected attention."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.utils import logging

from basiscli.checkpoints.kv_file import KVBases, KVConfig
from basiscli.runtime.caches import cache_of, given_cache
from basiscli.runtime.export import exported_files
from basiscli.runtime.kv_projection import KVProjection, attach, attention_modules

VOCABULARY, WINDOW, LAYERS = 200, 8, 3
FAR = 29
"""Tokens of a text that reaches far beyond the sliding windows."""
CLOSE = 1e-5
"""Allowed difference of logits, relative to the largest: what float32 gives over a few layers."""

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_mha": ("Llama", {"num_key_value_heads": 4}),
    "llama_gqa": ("Llama", {"num_key_value_heads": 4, "num_attention_heads": 8, "hidden_size": 64}),
    "llama_bias": ("Llama", {"num_key_value_heads": 2, "attention_bias": True}),
    "mistral_sliding": ("Mistral", {"num_key_value_heads": 2, "sliding_window": WINDOW}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen2_mixed": (
        "Qwen2",
        {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _MIXED},
    ),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    # A scale that is not 1/√d, one KV head, and heads wider than hidden_size / heads.
    "gemma3": (
        "Gemma3Text",
        {
            "num_key_value_heads": 1,
            "head_dim": 16,
            "sliding_window": WINDOW,
            "layer_types": _MIXED,
            "query_pre_attn_scalar": 10,
        },
    ),
    "phi3": ("Phi3", {"num_key_value_heads": 2}),
    # Its attention calls the cache `layer_past`.
    "gpt_neox": ("GPTNeoX", {}),
}
EVERY = sorted(ARCHITECTURES)
SLIDING = ["gemma3", "mistral_sliding", "qwen2_mixed"]


def make_dense(name: str, **changes: Any) -> Any:
    """Return a model whose attention is sharp enough that a cut basis shows, and whose biases are not zero."""
    family, own = ARCHITECTURES[name]
    config = getattr(transformers, f"{family}Config")(**{**_COMMON, **own, **changes})
    generator = torch.Generator().manual_seed(7)
    model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(weight + 0.2 * noise if weight.dim() == 1 else 0.2 * noise)
    return model.float().eval().requires_grad_(False)


@dataclass(frozen=True)
class Cut:
    """Bases [layers, 2, KV heads, d, d], and ranks of keys and of values, a list a layer."""

    bases: Tensor
    key_ranks: list[list[int]]
    value_ranks: list[list[int]]

    @property
    def widths(self) -> list[tuple[int, int]]:
        """Numbers a token takes in the keys and values of each layer's cache."""
        return [(sum(k), sum(v)) for k, v in zip(self.key_ranks, self.value_ranks, strict=True)]

    def projections(self, *, folded: bool = False, exact_prefill: bool = False) -> list[KVProjection]:
        """Return one projection a layer."""
        found = []
        for (keys, values), k, v in zip(self.bases, self.key_ranks, self.value_ranks, strict=True):
            projection = KVProjection(keys, None if folded else values, k, v)
            projection.exact_prefill = exact_prefill
            found.append(projection)
        return found


def shape_of(model: Any) -> tuple[int, int]:
    """Return KV heads and their dimensions."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def make_cut(model: Any, *, full: bool = False, seed: int = 3) -> Cut:
    """Return random orthogonal bases, and ranks that differ by layer, by head, and between keys and values."""
    heads, dim = shape_of(model)
    generator = torch.Generator().manual_seed(seed)
    bases = torch.linalg.qr(torch.randn(LAYERS, 2, heads, dim, dim, generator=generator))[0]
    ranks = 2 * torch.randint(1, dim // 2, (2, LAYERS, heads), generator=generator)  # 2 … d − 2
    if full:
        ranks = torch.full_like(ranks, dim)
    elif heads >= 4:
        # In the first layer, heads of equal ranks that do not lie side by side.
        ranks[0, 0, :4] = torch.tensor([4, 2, 4, 6])
        ranks[1, 0, :4] = torch.tensor([2, 6, 2, 6])
    keys, values = ranks.tolist()
    return Cut(bases, keys, values)


def compressed(dense: Any, cut: Cut, **options: bool) -> Any:
    """Return a copy of a model that uses a cut."""
    model = copy.deepcopy(dense)
    if options.get("folded"):
        fold_values(model, cut)
    return attach(model, cut.projections(**options))


def fold_values(model: Any, cut: Cut) -> None:
    """Turn the values of a Llama-like model into their bases, and turn them back in its output projection."""
    for module, (_, bases) in zip(attention_modules(model), cut.bases.double(), strict=True):
        heads, dim, _ = bases.shape
        value, out = module.v_proj, module.o_proj
        turned = bases.mT @ value.weight.double().view(heads, dim, -1)
        split = out.weight.double().view(len(out.weight), heads, -1, dim)
        value.weight.copy_(turned.flatten(0, 1))
        out.weight.copy_(torch.einsum("ohgd,hde->ohge", split, bases).reshape(out.weight.shape))
        if value.bias is not None:
            value.bias.copy_((bases.mT @ value.bias.double().view(heads, dim, 1)).flatten())


def texts(batch: int = 1, length: int = FAR, seed: int = 11) -> Tensor:
    """Return random tokens, none of which is padding."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(ids: Tensor, padding: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return rows whose first tokens are padding, and their mask."""
    mask = torch.arange(ids.shape[1])[None] >= torch.tensor(padding)[:, None]
    return ids * mask, mask.long()


def in_chunks(model: Any, ids: Tensor, sizes: Sequence[int], cache: Any = None, **inputs: Tensor) -> Tensor:
    """Return logits of a text that is fed in parts, each attending to what the cache holds."""
    assert sum(sizes) == ids.shape[1]
    mask, logits, end = inputs.get("attention_mask"), [], 0
    for size in sizes:
        start, end = end, end + size
        more = {} if mask is None else {"attention_mask": mask[:, :end]}
        if "position_ids" in inputs:
            more["position_ids"] = inputs["position_ids"][:, start:end]
        out = model(input_ids=ids[:, start:end], use_cache=True, **given_cache(model, cache), **more)
        cache = cache_of(out)
        logits.append(out.logits)
    return torch.cat(logits, 1)


def positions_of(mask: Tensor) -> Tensor:
    """Return the positions `generate` gives to left-padded tokens."""
    return (mask.cumsum(-1) - 1).clamp_min(0)


def difference(found: Tensor, expected: Tensor, counted: Tensor | None = None) -> float:
    """Return the largest difference of logits, relative to the largest logit, over the tokens that count."""
    assert found.shape == expected.shape
    apart, size = (found.double() - expected.double()).abs(), expected.double().abs()
    if counted is not None:
        apart, size = apart[counted.bool()], size[counted.bool()]
    assert torch.isfinite(apart).all()
    return float(apart.max() / size.max())


# The reference --------------------------------------------------------------------------------------------------------


def _reference_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """softmax((q U_K)(k U_K)ᵀ · scale)(v U_V) U_Vᵀ, a query head at a time; `module.prompt` tokens see whole keys."""
    (key_bases, value_bases), key_ranks, value_ranks = module.cut
    prompt, group = module.prompt, query.shape[1] // key.shape[1]
    heads = []
    for head in range(query.shape[1]):
        kv = head // group
        u_k, u_v = key_bases[kv][:, : key_ranks[kv]], value_bases[kv][:, : value_ranks[kv]]
        q, k, v = query[:, head], key[:, kv], value[:, kv]
        weights = ((q @ u_k) @ (k @ u_k).mT * scaling + attention_mask[:, 0]).softmax(-1)
        out = (weights @ (v @ u_v)) @ u_v.mT
        exact = (q @ k.mT * scaling + attention_mask[:, 0]).softmax(-1) @ v
        heads.append(torch.cat([exact[:, :prompt], out[:, prompt:]], 1))
    return torch.stack(heads, 2), None


@torch.no_grad()
def reference_logits(dense: Any, cut: Cut, ids: Tensor, *, prompt: int = 0, **inputs: Tensor) -> Tensor:
    """Return logits in float64 of one forward without a cache, by code that shares nothing with the run-time.

    Args:
        dense: the model that is cut.
        cut: how.
        ids: the text.
        prompt: how many of its first tokens attend to whole keys and values.
        inputs: mask and positions of the forward.
    """
    transformers.AttentionInterface.register("reference", _reference_attention)
    transformers.AttentionMaskInterface.register("reference", transformers.masking_utils.eager_mask)
    model = copy.deepcopy(dense).double()
    for module, *layer in zip(
        attention_modules(model), cut.bases.double(), cut.key_ranks, cut.value_ranks, strict=True
    ):
        module.cut, module.prompt = layer, prompt
    model.set_attn_implementation("reference")
    return model(input_ids=ids, use_cache=False, **inputs).logits


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    """Tests that want a gradient ask for it with `torch.enable_grad`."""
    with torch.no_grad():
        yield


@pytest.fixture(params=EVERY)
def dense(request: pytest.FixtureRequest) -> Any:
    """Return a tiny model of each architecture."""
    return make_dense(request.param)


# Folders --------------------------------------------------------------------------------------------------------------


def write_compressed(folder: Path, name: str, *, folded: bool = False) -> tuple[Any, Cut]:
    """Write what `basis compress --export` writes, without calibration: weights, bases and ranks, and the Python files.

    Returns:
        The dense model, and how it is cut.
    """
    dense = make_dense(name)
    cut = make_cut(dense)
    saved = copy.deepcopy(dense)
    if folded:
        fold_values(saved, cut)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    saved.save_pretrained(folder)
    if bars:
        logging.enable_progress_bar()
    dim = cut.bases.shape[-1]
    config = KVConfig(
        method="random", parameters={}, head_dim=dim, levels=dim // 2, values_folded=folded,
        key_ranks=cut.key_ranks, value_ranks=cut.value_ranks,
    )  # fmt: skip
    stored = KVBases(config, cut.bases, torch.ones(cut.bases.shape[:-1]))
    for file, content in (stored.files() | exported_files((folder / "config.json").read_bytes())).items():
        (folder / file).write_bytes(content)
    return dense, cut
