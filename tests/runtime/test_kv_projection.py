"""Forwards of a model with projected attention, against the dense model and against a slow reference in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

from basiscli.commands.kv.attention import Projector, set_bases
from basiscli.errors import InputError
from basiscli.runtime import kv_projection
from basiscli.runtime.caches import cache_of, given_cache
from basiscli.runtime.kv_projection import (
    Coefficients,
    GrowingLayer,
    KVProjection,
    attach,
    attention_modules,
    projected_attention,
)
from basiscli.runtime.support import check_attention
from tests.runtime.conftest import (
    CLOSE,
    FAR,
    LAYERS,
    SLIDING,
    WINDOW,
    compressed,
    difference,
    in_chunks,
    left_padded,
    make_cut,
    make_dense,
    positions_of,
    reference_logits,
    shape_of,
    texts,
)

# How a text of FAR tokens may be fed. Up to eight tokens take another path than more; the windows are full after eight.
CHUNKS = {
    "one by one": [1] * FAR,
    "at once": [FAR],
    "prompt and tokens": [14] + [1] * (FAR - 14),
    "mixed": [1, 3, 9, 2, 10, 4],
    "threes": [3] * 9 + [2],
    "long ones": [12, 12, 5],
}
CACHES: dict[str, Callable[[Any], Any]] = {
    "made by the model": lambda config: None,
    "dynamic": lambda config: DynamicCache(config=config),
    # Knows nothing of windows and keeps all tokens; the mask cuts.
    "dynamic without a config": lambda config: DynamicCache(),
    "growing in place": lambda config: Cache(layer_class_to_replicate=GrowingLayer),
    "static": lambda config: StaticCache(config=config, max_cache_len=FAR + 7),
}


# Whole bases ----------------------------------------------------------------------------------------------------------


def test_at_full_rank_a_forward_without_a_cache_is_the_dense_one(dense: Any) -> None:
    model, ids = compressed(dense, make_cut(dense, full=True)), texts(2)
    found = model(input_ids=ids, use_cache=False).logits
    assert difference(found, dense(input_ids=ids, use_cache=False).logits) <= CLOSE


@pytest.mark.parametrize("chunks", CHUNKS)
def test_at_full_rank_a_cached_text_is_the_dense_one(dense: Any, chunks: str) -> None:
    model, ids = compressed(dense, make_cut(dense, full=True)), texts(2)
    expected = dense(input_ids=ids, use_cache=False).logits
    for make in CACHES.values():
        assert difference(in_chunks(model, ids, CHUNKS[chunks], make(model.config)), expected) <= CLOSE


@pytest.mark.parametrize("chunks", ["prompt and tokens", "mixed"])
def test_at_full_rank_left_padding_is_the_dense_one(dense: Any, chunks: str) -> None:
    ids, mask = left_padded(texts(3), [0, 4, 11])
    inputs = {"attention_mask": mask, "position_ids": positions_of(mask)}
    model = compressed(dense, make_cut(dense, full=True))
    expected = dense(input_ids=ids, use_cache=False, **inputs).logits
    assert difference(model(input_ids=ids, use_cache=False, **inputs).logits, expected, mask) <= CLOSE
    for make in CACHES.values():
        found = in_chunks(model, ids, CHUNKS[chunks], make(model.config), **inputs)
        assert difference(found, expected, mask) <= CLOSE


# Cut bases ------------------------------------------------------------------------------------------------------------


def test_the_reference_is_the_dense_model_at_full_rank_and_another_one_below(dense: Any) -> None:
    ids = texts()
    expected = dense(input_ids=ids, use_cache=False).logits
    assert difference(reference_logits(dense, make_cut(dense, full=True), ids), expected) <= CLOSE
    assert difference(reference_logits(dense, make_cut(dense), ids), expected) > 0.1


def test_ragged_ranks_without_a_cache_are_the_reference(dense: Any) -> None:
    cut, ids = make_cut(dense), texts(2)
    found = compressed(dense, cut)(input_ids=ids, use_cache=False).logits
    assert difference(found, reference_logits(dense, cut, ids)) <= CLOSE


@pytest.mark.parametrize("chunks", CHUNKS)
def test_ragged_ranks_in_a_cache_are_the_reference(dense: Any, chunks: str) -> None:
    cut, ids = make_cut(dense), texts(2)
    model, expected = compressed(dense, cut), reference_logits(dense, cut, ids)
    for make in CACHES.values():
        assert difference(in_chunks(model, ids, CHUNKS[chunks], make(model.config)), expected) <= CLOSE


@pytest.mark.parametrize("chunks", ["prompt and tokens", "mixed"])
def test_ragged_ranks_with_left_padding_are_the_reference(dense: Any, chunks: str) -> None:
    cut = make_cut(dense)
    ids, mask = left_padded(texts(3), [0, 4, 11])
    inputs = {"attention_mask": mask, "position_ids": positions_of(mask)}
    model, expected = compressed(dense, cut), reference_logits(dense, cut, ids, **inputs)
    assert difference(model(input_ids=ids, use_cache=False, **inputs).logits, expected, mask) <= CLOSE
    for make in CACHES.values():
        found = in_chunks(model, ids, CHUNKS[chunks], make(model.config), **inputs)
        assert difference(found, expected, mask) <= CLOSE


@pytest.mark.parametrize("name", ["llama_gqa", "llama_bias", "qwen2_mixed", "gemma3"])
def test_folded_values_are_the_reference(name: str) -> None:
    dense = make_dense(name)
    cut, ids = make_cut(dense), texts(2)
    model, expected = compressed(dense, cut, folded=True), reference_logits(dense, cut, ids)
    assert difference(model(input_ids=ids, use_cache=False).logits, expected) <= CLOSE
    assert difference(in_chunks(model, ids, CHUNKS["mixed"]), expected) <= CLOSE


def test_a_float_mask_is_the_boolean_one() -> None:
    dense = make_dense("llama_gqa")
    model, ids = compressed(dense, make_cut(dense)), texts(2, 12)
    seen = torch.ones(12, 12).tril().bool().expand(2, 1, -1, -1)
    added = torch.zeros(2, 1, 12, 12).masked_fill(~seen, -torch.inf)
    expected = model(input_ids=ids, use_cache=False).logits
    for mask in (seen, added):
        assert difference(model(input_ids=ids, attention_mask=mask, use_cache=False).logits, expected) <= CLOSE
        cache = cache_of(model(input_ids=ids[:, :7], attention_mask=mask[..., :7, :7], use_cache=True))
        found = model(input_ids=ids[:, 7:], attention_mask=mask[..., 7:, :], **given_cache(model, cache)).logits
        assert difference(found, expected[:, 7:]) <= CLOSE


def test_attaching_again_replaces_the_projection() -> None:
    dense = make_dense("llama_gqa")
    first, second, ids = make_cut(dense), make_cut(dense, seed=4), texts()
    model = attach(compressed(dense, first), second.projections())
    assert difference(in_chunks(model, ids, [20, 9]), reference_logits(dense, second, ids)) <= CLOSE


# What the cache holds -------------------------------------------------------------------------------------------------


def test_a_dynamic_cache_holds_the_kept_numbers_and_no_more(dense: Any) -> None:
    cut = make_cut(dense)
    model, cache = compressed(dense, cut), DynamicCache(config=dense.config)
    in_chunks(model, texts(2), CHUNKS["prompt and tokens"], cache)
    assert len(cache.layers) == LAYERS
    for layer, (keys, values), module in zip(cache.layers, cut.widths, attention_modules(model), strict=True):
        tokens = WINDOW - 1 if layer.is_sliding else FAR
        assert layer.keys.shape == (2, 1, tokens, keys)
        assert layer.values.shape == (2, 1, tokens, values)
        assert layer.keys.numel() + layer.values.numel() == 2 * tokens * module.kv_projection.width


@pytest.mark.parametrize("name", SLIDING)
def test_the_sliding_models_have_sliding_layers(name: str) -> None:
    assert any(DynamicCache(config=make_dense(name).config).is_sliding)


def test_a_static_cache_has_room_for_the_kept_numbers_and_no_more(dense: Any) -> None:
    cut = make_cut(dense)
    model, cache = compressed(dense, cut), StaticCache(config=dense.config, max_cache_len=40)
    in_chunks(model, texts(2), CHUNKS["prompt and tokens"], cache)
    for layer, (keys, values) in zip(cache.layers, cut.widths, strict=True):
        tokens = WINDOW if layer.is_sliding else 40
        assert layer.keys.shape == (2, 1, tokens, keys)
        assert layer.values.shape == (2, 1, tokens, values)


def test_a_cache_that_grows_in_place_has_little_room_to_spare() -> None:
    dense = make_dense("llama_gqa")
    cut, tokens = make_cut(dense), 100
    cache = Cache(layer_class_to_replicate=GrowingLayer)
    in_chunks(compressed(dense, cut), texts(2, tokens), [10] * 10, cache)
    for layer, widths in zip(cache.layers, cut.widths, strict=True):
        for held, width in zip((layer.keys, layer.values), widths, strict=True):
            assert held.shape == (2, 1, tokens, width)
            assert held.untyped_storage().nbytes() <= 4 * 2 * (tokens + 32) * width


@pytest.mark.parametrize("name", ["llama_gqa", "gemma3"])
def test_a_static_cache_that_was_allocated_for_whole_heads_is_allocated_again(name: str) -> None:
    dense = make_dense(name)
    cut, ids, (heads, dim) = make_cut(dense), texts(2), shape_of(dense)
    cache = StaticCache(config=dense.config, max_cache_len=40)
    cache.early_initialization(2, heads, dim, torch.float32, torch.device("cpu"))
    found = in_chunks(compressed(dense, cut), ids, CHUNKS["mixed"], cache)
    assert difference(found, reference_logits(dense, cut, ids)) <= CLOSE
    assert [(x.keys.shape[-1], x.values.shape[-1]) for x in cache.layers] == cut.widths


@pytest.mark.parametrize("name", ["llama_gqa", "gemma3"])
@pytest.mark.parametrize("make", [CACHES["dynamic"], CACHES["static"]], ids=["dynamic", "static"])
def test_a_cache_that_the_dense_model_filled_is_refused_until_it_is_reset(name: str, make: Any) -> None:
    dense = make_dense(name)
    cut, ids = make_cut(dense), texts(2)
    model, cache = compressed(dense, cut), make(dense.config)
    in_chunks(dense, ids, [FAR], cache)
    with pytest.raises(RuntimeError):
        model(input_ids=ids[:, :1], **given_cache(model, cache))
    cache.reset()
    assert difference(in_chunks(model, ids, [20, 9], cache), reference_logits(dense, cut, ids)) <= CLOSE


# Operations on caches -------------------------------------------------------------------------------------------------


def _filled(model: Any, ids: Tensor, make: Callable[[Any], Any]) -> Any:
    cache = make(model.config)
    in_chunks(model, ids, [ids.shape[1] - 3, 1, 1, 1], cache)
    return cache


GROWING = pytest.mark.parametrize(
    "make", [CACHES["dynamic"], CACHES["growing in place"]], ids=["dynamic", "growing in place"]
)


@GROWING
@pytest.mark.parametrize("name", ["llama_gqa", "gemma3"])
def test_a_cropped_cache_goes_on_with_another_text(name: str, make: Any) -> None:
    dense = make_dense(name)
    cut, ids, others = make_cut(dense), texts(2), texts(2, seed=12)
    model, cache = compressed(dense, cut), make(dense.config)
    cache.activate_past_recording()  # without it transformers does not crop a full window, dense or not
    in_chunks(model, ids[:, :20], [14, 1, 1, 4], cache)
    cache.crop(-5)
    text = torch.cat([ids[:, :15], others[:, 15:]], 1)
    found = in_chunks(model, text[:, 15:], [1, 3, 10], cache)
    assert difference(found, reference_logits(dense, cut, text)[:, 15:]) <= CLOSE


def _reordered(cache: Any) -> list[int]:
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    return [2, 0, 0]


def _selected(cache: Any) -> list[int]:
    cache.batch_select_indices(torch.tensor([2, 1]))
    return [2, 1]


def _repeated(cache: Any) -> list[int]:
    cache.batch_repeat_interleave(2)
    return [0, 0, 1, 1, 2, 2]


@GROWING
@pytest.mark.parametrize("change", [_reordered, _selected, _repeated])
@pytest.mark.parametrize("name", ["llama_gqa", "gemma3"])
def test_a_cache_with_other_rows_goes_on_with_their_texts(name: str, change: Any, make: Any) -> None:
    dense = make_dense(name)
    cut, ids = make_cut(dense), texts(3)
    model = compressed(dense, cut)
    cache = _filled(model, ids[:, :15], make)
    ids = ids[change(cache)]
    found = in_chunks(model, ids[:, 15:], [1, 1, 2, 10], cache)
    assert difference(found, reference_logits(dense, cut, ids)[:, 15:]) <= CLOSE


@GROWING
def test_a_copied_cache_goes_its_own_way(make: Any) -> None:
    dense = make_dense("llama_gqa")
    cut, ids, others = make_cut(dense), texts(2), texts(2, seed=12)
    model = compressed(dense, cut)
    cache = _filled(model, ids[:, :15], make)
    copied = copy.deepcopy(cache)
    branch = torch.cat([ids[:, :15], others[:, 15:]], 1)
    in_chunks(model, ids[:, 15:20], [1] * 5, cache)
    found = in_chunks(model, branch[:, 15:], [1] * 14, copied)
    assert difference(found, reference_logits(dense, cut, branch)[:, 15:]) <= CLOSE
    found = in_chunks(model, ids[:, 20:], [4, 5], cache)
    assert difference(found, reference_logits(dense, cut, ids)[:, 20:]) <= CLOSE


# One layer ------------------------------------------------------------------------------------------------------------


def test_packed_coefficients_are_those_of_each_head_bucket_by_bucket() -> None:
    generator = torch.Generator().manual_seed(0)
    bases = torch.linalg.qr(torch.randn(2, 4, 8, 8, generator=generator))[0]
    keys, values = torch.randn(2, 3, 4, 5, 8, generator=generator)
    projection = KVProjection(*bases, [4, 2, 4, 6], [2, 6, 2, 6])
    assert [(x.heads, x.key_rank, x.value_rank) for x in projection.buckets] == [
        (slice(3, 4), 6, 6),
        ([0, 2], 4, 2),
        (slice(1, 2), 2, 6),
    ]
    assert projection.width == 32
    packed = projection.encode(keys, values)
    for found, x, basis, ranks in zip(packed, (keys, values), bases, ([4, 2, 4, 6], [2, 6, 2, 6]), strict=True):
        parts = [x[:, head] @ basis[head, :, : ranks[head]] for head in (3, 0, 2, 1)]
        torch.testing.assert_close(found, torch.cat(parts, -1)[:, None])


# Other precisions and gradients ---------------------------------------------------------------------------------------


def test_bfloat16_is_no_worse_than_in_the_dense_model(dense: Any) -> None:
    cut, ids = make_cut(dense), texts(2)
    model = compressed(dense, cut)
    expected = model(input_ids=ids, use_cache=False).logits, dense(input_ids=ids, use_cache=False).logits
    error, usual = (
        difference(copy.deepcopy(x).to(torch.bfloat16)(input_ids=ids, use_cache=False).logits, y)
        for x, y in zip((model, dense), expected, strict=True)
    )
    # Rounding, as in the dense model, of two more products: at most twice as much. Cutting shows as 1.
    assert error <= 2 * usual < 0.1
    cached = in_chunks(copy.deepcopy(model).to(torch.bfloat16), ids, CHUNKS["mixed"])
    assert cached.dtype == torch.bfloat16
    assert difference(cached, expected[0]) <= 2 * usual


@torch.enable_grad()
def test_gradients_of_a_forward_without_a_cache_are_those_of_projected_keys_and_values(dense: Any) -> None:
    cut, ids = make_cut(dense), texts(2, 12)
    model = compressed(dense, cut).requires_grad_(True)
    plain = copy.deepcopy(dense).requires_grad_(True)
    projectors = [Projector() for _ in cut.bases]
    attach(plain, projectors)
    ranks = torch.tensor([cut.key_ranks, cut.value_ranks]).transpose(0, 1)
    set_bases(projectors, cut.bases, ranks)
    for each in (model, plain):
        each(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    expected = dict(plain.named_parameters())
    for name, weight in model.named_parameters():
        assert weight.grad is not None
        # Sums of a few thousand float32 products, in another order.
        size = float(weight.grad.abs().max())
        torch.testing.assert_close(weight.grad, expected[name].grad, rtol=1e-4, atol=1e-4 * size)


@torch.enable_grad()
@pytest.mark.parametrize("make", [CACHES["dynamic"], CACHES["growing in place"]], ids=["dynamic", "growing in place"])
def test_gradients_flow_through_a_cache_that_grows(make: Any) -> None:
    dense = make_dense("llama_gqa")
    ids, grads = texts(2, 12), []
    for chunks in ([12], [5, 1, 6]):
        model = compressed(dense, make_cut(dense)).requires_grad_(True)
        in_chunks(model, ids, chunks, make(model.config)).square().mean().backward()
        grads.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4 * float(grads[0].abs().max()))


# What must not go wrong in silence ------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["sdpa", "eager"])
@pytest.mark.parametrize("full", [True, False], ids=["full rank", "cut"])
def test_another_attention_does_not_take_coefficients(dense: Any, other: str, full: bool) -> None:
    model = compressed(dense, make_cut(dense, full=full))
    model.set_attn_implementation(other)
    with pytest.raises((TypeError, AttributeError), match="Coefficients"):
        model(input_ids=texts(), use_cache=True)


@pytest.mark.parametrize("asked", ["softcap", "s_aux", "position_bias"])
def test_attention_that_has_no_projected_form_is_refused(asked: str) -> None:
    dense = make_dense("llama_gqa")
    model = compressed(dense, make_cut(dense))
    query, key = torch.zeros(1, 8, 3, 8), torch.zeros(1, 4, 3, 8)
    module = attention_modules(model)[0]
    projected_attention(module, query, key, key, None, **{asked: None})
    with pytest.raises(NotImplementedError, match=asked):
        projected_attention(module, query, key, key, None, **{asked: torch.ones(8)})


def test_a_model_without_a_projection_says_how_to_get_one() -> None:
    kv_projection.register()
    model = make_dense("llama_gqa")
    model.set_attn_implementation(kv_projection.ATTENTION)
    with pytest.raises(RuntimeError, match=r"basiscli\.load"):
        model(input_ids=texts())


def test_a_projection_a_layer_is_needed() -> None:
    dense = make_dense("llama_gqa")
    with pytest.raises(ValueError, match="shorter"):
        attach(dense, make_cut(dense).projections()[:-1])


def test_coefficients_are_no_tensor() -> None:
    with pytest.raises(TypeError):
        torch.zeros(1, 1, 2, 3) @ Coefficients(torch.zeros(1, 1, 3, 2))  # type: ignore[operator]


# Which models are taken -----------------------------------------------------------------------------------------------


def _shape(model: Any) -> SimpleNamespace:
    heads, dim = shape_of(model)
    return SimpleNamespace(layers=LAYERS, heads=heads, dim=dim)


def test_the_architectures_are_supported(dense: Any) -> None:
    assert check_attention(dense, _shape(dense), Path("config.json")) <= CLOSE


_HIDDEN = {
    "vocab_size": 200, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "hidden_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
FOREIGN: dict[str, tuple[dict[str, Any], str]] = {
    # It calls the cache `layer_past` and attends to it itself: without the hook it would pass as dense.
    "Falcon": (_HIDDEN, "Coefficients"),
    "Gemma2": ({**_HIDDEN, "num_key_value_heads": 4, "head_dim": 12, "intermediate_size": 64}, "softcap"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_attention_of_a_models_own_making_is_refused(name: str) -> None:
    config, reason = FOREIGN[name]
    made = getattr(transformers, f"{name}Config")(**config)
    model = getattr(transformers, f"{name}ForCausalLM")(made).eval()
    with pytest.raises(InputError, match=reason) as caught:
        check_attention(model, SimpleNamespace(layers=2, heads=4, dim=12), Path("config.json"))
    assert caught.value.file == "config.json"


def test_another_number_of_layers_is_refused() -> None:
    dense = make_dense("llama_gqa")
    shape = SimpleNamespace(layers=LAYERS + 1, heads=4, dim=8)
    with pytest.raises(InputError, match="3 attention modules in a model of 4 layers"):
        check_attention(dense, shape, Path("config.json"))


def test_a_cache_that_would_stay_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = make_dense("gpt_neox")
    monkeypatch.setattr(kv_projection, "Cache", str)  # so that the hook does not see the cache
    with pytest.raises(InputError, match="does not take coefficients"):
        check_attention(dense, _shape(dense), Path("config.json"))


def test_heads_with_equal_keys_and_different_values_keep_their_places() -> None:
    """Buckets are of keys and values together: the values' ranks alone may put the second head first."""
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.linalg.qr(torch.randn(2, 3, 8, 8, generator=generator))[0]
    query, key, value = torch.randn(3, 2, 3, 5, 8, generator=generator)
    for key_ranks, value_ranks in (([4, 4, 4], [4, 6, 4]), ([4, 6, 4], [4, 4, 4]), ([8, 8, 8], [2, 8, 4])):
        projection = KVProjection(keys, values, key_ranks, value_ranks)
        got = projection.attend(query, *projection.encode(key, value), None, 8**-0.5)
        for head, (k, v) in enumerate(zip(key_ranks, value_ranks, strict=True)):
            cut_k, cut_v = keys[head, :, :k] @ keys[head, :, :k].mT, values[head, :, :v] @ values[head, :, :v].mT
            expected = torch.nn.functional.scaled_dot_product_attention(
                query[:, head], key[:, head] @ cut_k, value[:, head] @ cut_v, is_causal=True, scale=8**-0.5
            )
            torch.testing.assert_close(got[:, :, head], expected, rtol=1e-5, atol=1e-5)
