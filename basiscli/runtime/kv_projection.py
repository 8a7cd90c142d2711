"""A KV cache of projection coefficients, for `transformers` models whose code is not touched.

Keys (after RoPE) and values of a KV head are written in an orthogonal basis of the head's d dimensions, and only the
first r coordinates are kept:

    softmax((q U_K) (k U_K)ᵀ · scale) (v U_V) U_Vᵀ

Two hooks do it. Before an attention module runs, the cache it was given is replaced by a proxy whose `update` turns
keys and values into coefficients and hands those to the real cache; all heads' coefficients of a layer lie side by side
in one tensor [batch, 1, tokens, Σ r], so that every cache class of transformers (growing, static, sliding, offloaded)
holds them as they are, whatever the ranks of the heads. And an attention function registered under the name "basis"
projects the queries and maps the result back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicLayer

from basiscli.runtime.kv_heads import buckets_of, grouped_attention, heads_of, plain_attention

ATTENTION = "basis"
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")


class Coefficients:
    """What a layer's cache update gives to the attention function in place of keys or of values.

    Deliberately no tensor: any other attention that is handed one fails, instead of mixing keys in one basis with
    queries in another (at r = d the shapes would fit).
    """

    __slots__ = ("exact", "packed")

    def __init__(self, packed: Tensor, exact: Tensor | None = None) -> None:
        self.packed, self.exact = packed, exact


class KVProjection(nn.Module):
    """The bases and ranks of one layer, as a submodule of its attention module.

    Args:
        keys: bases of the keys [KV heads, d, d], columns in falling importance.
        values: bases of the values; None where they are folded into the model's weights, which then give coordinates.
        key_ranks: dimensions kept of each KV head's keys.
        value_ranks: dimensions kept of each KV head's values.
    """

    key_basis: Tensor
    value_basis: Tensor
    key_columns: Tensor
    value_columns: Tensor
    head_places: Tensor

    def __init__(
        self, keys: Tensor, values: Tensor | None, key_ranks: Sequence[int], value_ranks: Sequence[int]
    ) -> None:
        super().__init__()
        self.heads, self.dim = keys.shape[:2]
        self.key_ranks, self.value_ranks = tuple(key_ranks), tuple(value_ranks)
        self.folded = values is None
        self.exact_prefill = False
        self.buckets = buckets_of(self.key_ranks, self.value_ranks)
        top_k, top_v = max(self.key_ranks), max(self.value_ranks)
        values = torch.eye(self.dim, device=keys.device).expand_as(keys) if values is None else values
        order = [head for bucket in self.buckets for head in heads_of(bucket, self.heads)]
        # Where each head is among the buckets' heads: attention puts them back into their order.
        places = torch.tensor(order).argsort()
        self.register_buffer("head_places", places.to(keys.device), persistent=False)
        self.register_buffer("key_basis", keys[..., :top_k].contiguous(), persistent=False)
        self.register_buffer("value_basis", values[..., :top_v].contiguous(), persistent=False)
        # Which coordinates are kept, of all heads' side by side, in the order of the buckets.
        columns = torch.tensor([h * top_k + c for h in order for c in range(self.key_ranks[h])])
        self.register_buffer("key_columns", columns.to(keys.device), persistent=False)
        columns = torch.tensor([h * top_v + c for h in order for c in range(self.value_ranks[h])])
        self.register_buffer("value_columns", columns.to(keys.device), persistent=False)

    @property
    def width(self) -> int:
        """Numbers a token takes in this layer's cache."""
        return sum(self.key_ranks) + sum(self.value_ranks)

    def encode(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the kept coefficients of keys and values [B, H, T, d] as [B, 1, T, Σ r] each."""
        kept = values[..., : self.value_basis.shape[-1]] if self.folded else values @ self.value_basis.to(values.dtype)
        return (
            self._pack(keys @ self.key_basis.to(keys.dtype), self.key_columns),
            self._pack(kept, self.value_columns),
        )

    def _pack(self, coefficients: Tensor, columns: Tensor) -> Tensor:
        batch, heads, tokens, rank = coefficients.shape
        flat = coefficients.transpose(1, 2).reshape(batch, 1, tokens, heads * rank)
        # One bucket: everything is kept, in the order of the heads. With more, heads whose keys are alike may still
        # change places, since a bucket is of keys and values together.
        return flat if len(self.buckets) == 1 else flat.index_select(-1, columns)

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, dropout: float = 0.0
    ) -> Tensor:
        """Return attention [B, T, Hq, d] of queries [B, Hq, T, d] over packed keys and values [B, 1, S, Σ r].

        Without a mask the queries are the last (or, over a longer static cache, the first) tokens of a causal text, or
        one token that sees everything.
        """
        batch, heads, tokens, _ = query.shape
        group = heads // self.heads
        folded = query.reshape(batch, self.heads, group * tokens, self.dim) @ self.key_basis.to(query.dtype)
        top = self.value_basis.shape[-1]
        parts = []
        for bucket in self.buckets:
            shape = (batch, -1, bucket.count)
            k = keys[:, 0, :, bucket.keys].view(*shape, bucket.key_rank).transpose(1, 2)
            v = values[:, 0, :, bucket.values].view(*shape, bucket.value_rank).transpose(1, 2)
            q = folded[:, bucket.heads, :, : bucket.key_rank]
            part = grouped_attention(q.unflatten(2, (group, tokens)), k, v, mask, scale, dropout).flatten(2, 3)
            parts.append(pad(part, (0, top - bucket.value_rank)))
        out = parts[0] if len(parts) == 1 else torch.cat(parts, 1).index_select(1, self.head_places)
        out = pad(out, (0, self.dim - top)) if self.folded else out @ self.value_basis.to(out.dtype).mT
        return out.view(batch, heads, tokens, self.dim).transpose(1, 2)

    def forward(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor | Coefficients,
        value: Tensor | Coefficients,
        mask: Tensor | None,
        scale: float,
        dropout: float,
    ) -> Tensor:
        """Attend, over coefficients that come from a cache or over keys and values that never saw one."""
        if isinstance(key, Coefficients) and isinstance(value, Coefficients):
            if key.exact is not None and value.exact is not None:
                return self._exact(query, key.exact, value.exact, mask, scale, dropout)
            return self.attend(query, key.packed, value.packed, mask, scale, dropout)
        assert isinstance(key, Tensor) and isinstance(value, Tensor)
        if self.exact_prefill:
            return self._exact(query, key, value, mask, scale, dropout)
        return self.attend(query, *self.encode(key, value), mask, scale, dropout)

    def _exact(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dropout: float
    ) -> Tensor:
        """Attend over whole keys and values; folded values come out in the basis that the folded weights expect."""
        mask = None if mask is None else mask[..., : key.shape[2]]  # a static cache's mask is as long as the cache
        return plain_attention(query, key, value, mask, scale, dropout)


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A `DynamicLayer` that is not copied for every token: it keeps room for a sixteenth more than it holds."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._rooms: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append, in place where there is room, and return all."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            both: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return both
        if self.get_seq_length() == 0:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
        else:
            self.keys = self._append("keys", self.keys, key_states)
            self.values = self._append("values", self.values, value_states)
        return self.keys, self.values

    def _append(self, name: str, held: Tensor, new: Tensor) -> Tensor:
        length, total = held.shape[-2], held.shape[-2] + new.shape[-2]
        room = self._rooms.get(name)
        # Cropping leaves a view of the room; reordering and selecting leave another tensor, which the room is not of.
        mine = room is not None and room.data_ptr() == held.data_ptr() and room.shape[:2] == held.shape[:2]
        if room is None or not mine or room.shape[-2] < total:
            room = held.new_empty((*held.shape[:2], total + max(32, total // 16), held.shape[-1]))
            room[:, :, :length] = held
            self._rooms[name] = room
        room[:, :, length:total] = new
        return room[:, :, :total]

    def offload(self) -> None:
        """Move to the CPU; the room on the device is given up."""
        self._rooms = {}
        super().offload()

    def reset(self) -> None:
        """Forget everything."""
        self._rooms = {}
        super().reset()


class ProjectingCache:
    """Stands between an attention module and the cache it was given: coefficients go in, `Coefficients` come out."""

    def __init__(self, cache: Any, projection: KVProjection) -> None:
        self._cache, self._projection = cache, projection

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Cache new keys and values [B, H, T, d]; return all coefficients that are cached, marked as such."""
        projection = self._projection
        new = projection.encode(keys, values)
        layers = self._cache.layers
        layer = layers[layer_idx] if layer_idx < len(layers) else None
        if self._cache.layer_class_to_replicate is DynamicLayer:
            self._cache.layer_class_to_replicate = GrowingLayer
        if layer is not None and type(layer) is DynamicLayer and not layer.is_initialized:
            layers[layer_idx] = layer = GrowingLayer()
        if layer is not None and _allocated(layer) not in (None, (1, new[0].shape[-1], new[1].shape[-1])):
            # Reading the length would break a compiled graph.
            if not torch.compiler.is_compiling() and int(self._cache.get_seq_length(layer_idx)):
                raise RuntimeError("the cache holds another model's keys and values; give a new one, or reset this one")
            layer.is_initialized = False  # allocated ahead, for whole keys and values
        exact = projection.exact_prefill and keys.shape[-2] > 1 and not int(self._cache.get_seq_length(layer_idx))
        packed = self._cache.update(*new, layer_idx, *args, **kwargs)
        return Coefficients(packed[0], keys if exact else None), Coefficients(packed[1], values if exact else None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def attach(model: Any, projections: Sequence[nn.Module]) -> Any:
    """Make a model use one projection a layer, in its cache and in forwards without one; return the model."""
    for module, projection in zip(attention_modules(model), projections, strict=True):
        weight = next(module.parameters())
        module.kv_projection = projection.to(weight.device)
        if not getattr(module, "caches_coefficients", False):
            module.register_forward_pre_hook(_use_proxy, with_kwargs=True)
            module.caches_coefficients = True  # type: ignore[assignment]
    register()
    model.set_attn_implementation(ATTENTION)
    return model


def attention_modules(model: Any) -> list[nn.Module]:
    """Return the self-attention modules of a decoder, one a layer, in order."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        place = getattr(module, "layer_idx", None)
        if isinstance(place, int) and type(module).__name__.endswith("Attention"):
            found.setdefault(place, module)
    return [found[place] for place in sorted(found)]


def register() -> None:
    """Make `attn_implementation="basis"` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, projected_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # without it the mask is silently None


def projected_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | Coefficients,
    value: Tensor | Coefficients,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query [B, Hq, T, d] → [B, T, Hq, d].

    Raises:
        NotImplementedError: the model asks for something that only its own attention does.
    """
    asked = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if asked:
        raise NotImplementedError(f"attention with {', '.join(asked)} has no projected form")
    projection: Any = getattr(module, "kv_projection", None)
    if projection is None:
        raise RuntimeError("no KV projection is attached to this model; load it with basiscli.load(folder)")
    # The model's scale, 1/√d of the whole head: √r would be another softmax.
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return projection(module, query, key, value, attention_mask, scale, dropout), None


def _allocated(layer: Any) -> tuple[int, int, int] | None:
    """Return heads and widths of keys and values that a static layer has room for; None for one that has none yet."""
    if not hasattr(layer, "k_head_dim") or not layer.is_initialized:
        return None
    return layer.num_heads, layer.k_head_dim, layer.v_head_dim


def _use_proxy(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    projection = module.kv_projection
    # Found by what it is: its name is `past_key_values`, from transformers 5.24 on `cache`, in GPT-NeoX `layer_past`.
    caches = [name for name, value in kwargs.items() if isinstance(value, Cache)]
    if not caches or not isinstance(projection, KVProjection):
        return None
    return args, {**kwargs, **{name: ProjectingCache(kwargs[name], projection) for name in caches}}
