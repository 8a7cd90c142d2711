"""What `generate` does with a small cache: against the dense model, against no cache, and against the reference."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, DynamicCache, StaticCache

from basiscli.runtime.caches import given_cache
from basiscli.runtime.kv_projection import attention_modules
from tests.runtime.conftest import (
    CLOSE,
    FAR,
    SLIDING,
    Cut,
    compressed,
    difference,
    in_chunks,
    left_padded,
    make_cut,
    make_dense,
    positions_of,
    reference_logits,
    texts,
)

PROMPT, NEW = 12, 12
"""Together they reach beyond the windows."""


def generated(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """Return the new tokens; greedy, unless the options say otherwise."""
    options = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids)} | options
    with torch.random.fork_rng():
        torch.manual_seed(5)
        found = model.generate(ids, **options)
    assert torch.equal(
        found[:, : ids.shape[1]].expand(len(found), -1), ids.repeat_interleave(len(found) // len(ids), 0)
    )
    return found[:, ids.shape[1] :]


def greedy_reference(dense: Any, cut: Cut, ids: Tensor, *, exact_prompt: bool = False) -> Tensor:
    """Return the greedy tokens of the reference, which has no cache."""
    text = ids
    for _ in range(NEW):
        logits = reference_logits(dense, cut, text, prompt=ids.shape[1] if exact_prompt else 0)
        text = torch.cat([text, logits[:, -1:].argmax(-1)], 1)
    return text[:, ids.shape[1] :]


# What `generate` can be told, beside max_new_tokens. The other paths, on a CPU: "offloaded" needs a GPU, "quantized" a
# package of its own.
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "several": {"num_return_sequences": 3, "do_sample": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_at_full_rank_the_tokens_are_the_dense_models(dense: Any, way: str) -> None:
    model, ids = compressed(dense, make_cut(dense, full=True)), texts(2, PROMPT)
    assert torch.equal(generated(model, ids, **WAYS[way]), generated(dense, ids, **WAYS[way]))


@pytest.mark.parametrize("way", WAYS)
def test_the_tokens_are_those_of_the_model_without_a_cache(dense: Any, way: str) -> None:
    model, ids = compressed(dense, make_cut(dense)), texts(2, PROMPT)
    assert torch.equal(generated(model, ids, **WAYS[way]), generated(model, ids, use_cache=False, **WAYS[way]))


@pytest.mark.parametrize("name", ["llama_gqa", "gemma3"])
def test_the_tokens_are_those_of_the_reference(name: str) -> None:
    dense = make_dense(name)
    cut, ids = make_cut(dense), texts(2, PROMPT)
    found = generated(compressed(dense, cut), ids)
    assert torch.equal(found, greedy_reference(dense, cut, ids))
    assert not torch.equal(found, generated(dense, ids))


CACHED: dict[str, dict[str, Any]] = {
    "static": {"cache_implementation": "static"},
    "in parts": {"prefill_chunk_size": 5},
    "static in parts": {"cache_implementation": "static", "prefill_chunk_size": 5},
    "lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("way", CACHED)
def test_another_cache_or_schedule_gives_the_same_tokens(dense: Any, way: str) -> None:
    ids = texts(1, PROMPT)
    ids[:, 6:] = ids[:, :6]  # something to look up
    model = compressed(dense, make_cut(dense))
    assert torch.equal(generated(model, ids, **CACHED[way]), generated(model, ids, use_cache=False))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers offloads from a GPU only")
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
@pytest.mark.parametrize("name", ["llama_gqa", "gemma3"])
def test_an_offloaded_cache_gives_the_same_tokens(name: str, kind: str) -> None:
    dense = make_dense(name)
    model, ids = compressed(dense, make_cut(dense)).cuda(), texts(2, PROMPT).cuda()
    # Compiled, a cache that copies on streams of its own ends the process (torch 2.11's dynamo, on an H100).
    found = generated(model, ids, cache_implementation=kind, disable_compile=True)
    assert torch.equal(found, generated(model, ids, use_cache=False))


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_a_padded_batch_gives_the_tokens_of_each_prompt_alone(dense: Any, options: dict[str, Any]) -> None:
    model, padding = compressed(dense, make_cut(dense)), [0, 3, 9]
    ids, mask = left_padded(texts(3, PROMPT), padding)
    together = generated(model, ids, attention_mask=mask, **options)
    for row, start in enumerate(padding):
        assert torch.equal(together[row : row + 1], generated(model, ids[row : row + 1, start:]))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama_gqa", "gemma3", "phi3", "gpt_neox"])
def test_a_conversation_goes_on_with_the_users_cache(name: str, kind: str) -> None:
    dense = make_dense(name)
    model, ids, more = compressed(dense, make_cut(dense)), texts(1, PROMPT), texts(1, 10, seed=12)
    config = dense.config
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=60)
    first = generated(model, ids, **given_cache(model, cache))
    # All but the last token, which nothing attended to, is in the cache.
    assert int(cache.get_seq_length()) == PROMPT + NEW - 1
    text = torch.cat([ids, first, more], 1)
    assert torch.equal(generated(model, text, **given_cache(model, cache)), generated(model, text, use_cache=False))
    assert {layer.keys.shape[1] for layer in cache.layers} == {1}


# Assisted generation --------------------------------------------------------------------------------------------------


class _Calls:
    """Counts the forwards of a model."""

    def __init__(self, model: Any) -> None:
        self.count = 0
        model.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.count += 1


@pytest.mark.parametrize("name", ["llama_gqa", *SLIDING])
@pytest.mark.parametrize("helper", ["dense", "cut", "other cut"])
def test_a_compressed_model_takes_an_assistants_tokens(name: str, helper: str) -> None:
    dense = make_dense(name)
    cut, ids = make_cut(dense), texts(1, PROMPT)
    model = compressed(dense, cut)
    assistant = {
        "dense": dense,
        "cut": compressed(dense, cut),
        "other cut": compressed(dense, make_cut(dense, seed=4)),
    }[helper]
    expected, calls = generated(model, ids), _Calls(model)
    assert torch.equal(generated(model, ids, assistant_model=assistant), expected)
    if helper == "cut":  # all that it proposes is right
        assert calls.count < NEW


@pytest.mark.parametrize("name", ["llama_gqa", *SLIDING])
@pytest.mark.parametrize("full", [True, False], ids=["full rank", "cut"])
def test_a_compressed_model_assists_the_dense_one(name: str, full: bool) -> None:
    dense, ids = make_dense(name), texts(1, PROMPT)
    assistant = compressed(dense, make_cut(dense, full=full))
    expected, calls = generated(dense, ids), _Calls(dense)
    assert torch.equal(generated(dense, ids, assistant_model=assistant), expected)
    if full:
        assert calls.count < NEW


# Exact prefill --------------------------------------------------------------------------------------------------------


MAKERS = [lambda config: DynamicCache(config=config), lambda config: StaticCache(config=config, max_cache_len=FAR + 7)]


@pytest.mark.parametrize("make", MAKERS, ids=["dynamic", "static"])
def test_an_exact_prompt_is_the_dense_one_and_what_follows_attends_to_coefficients(
    dense: Any, make: Callable[[Any], Any]
) -> None:
    cut, ids, prompt = make_cut(dense), texts(2), 14
    model = compressed(dense, cut, exact_prefill=True)
    found = in_chunks(model, ids, [prompt] + [1] * 10 + [5], make(dense.config))
    expected = reference_logits(dense, cut, ids, prompt=prompt)
    assert difference(found[:, :prompt], dense(input_ids=ids[:, :prompt]).logits) <= CLOSE
    assert difference(found, expected) <= CLOSE
    # A compressed prefill is something else, and so would be dense decoding.
    for other in (reference_logits(dense, cut, ids), dense(input_ids=ids).logits):
        assert difference(other[:, prompt:], expected[:, prompt:]) > 0.01


@pytest.mark.parametrize("make", MAKERS, ids=["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama_gqa", "gemma3", "mistral_sliding"])
def test_an_exact_prompt_with_left_padding(name: str, make: Callable[[Any], Any]) -> None:
    dense = make_dense(name)
    cut, prompt = make_cut(dense), 14
    ids, mask = left_padded(texts(3), [0, 4, 11])
    inputs = {"attention_mask": mask, "position_ids": positions_of(mask)}
    model = compressed(dense, cut, exact_prefill=True)
    found = in_chunks(model, ids, [prompt] + [1] * 10 + [5], make(dense.config), **inputs)
    assert difference(found, reference_logits(dense, cut, ids, prompt=prompt, **inputs), mask) <= CLOSE


@pytest.mark.parametrize("make", MAKERS, ids=["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama_gqa", "llama_bias", "gemma3"])
def test_an_exact_prompt_with_folded_values(name: str, make: Callable[[Any], Any]) -> None:
    dense = make_dense(name)
    cut, ids = make_cut(dense), texts(2)
    model = compressed(dense, cut, folded=True, exact_prefill=True)
    found = in_chunks(model, ids, [14] + [1] * 10 + [5], make(dense.config))
    assert difference(found, reference_logits(dense, cut, ids, prompt=14)) <= CLOSE
    assert difference(model(input_ids=ids, use_cache=False).logits, dense(input_ids=ids).logits) <= CLOSE


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama_gqa", "gemma3"])
def test_generation_after_an_exact_prompt_is_the_references(name: str, options: dict[str, Any]) -> None:
    dense = make_dense(name)
    cut, ids = make_cut(dense), texts(2, PROMPT)
    found = generated(compressed(dense, cut, exact_prefill=True), ids, **options)
    assert torch.equal(found, greedy_reference(dense, cut, ids, exact_prompt=True))


def test_after_a_reset_the_next_prompt_is_exact_again() -> None:
    dense = make_dense("llama_gqa")
    cut, ids, others = make_cut(dense), texts(2), texts(2, seed=12)
    model = compressed(dense, cut, exact_prefill=True)
    for make in MAKERS:
        cache = make(dense.config)
        in_chunks(model, ids, [20, 9], cache)
        cache.reset()
        found = in_chunks(model, others, [20, 9], cache)
        assert difference(found, reference_logits(dense, cut, others, prompt=20)) <= CLOSE


# Compiled decoding ----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the compiler's trace, which pytest would format and keep, out of the log."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)


@contextmanager
def counted_graphs() -> Iterator[Callable[[], int]]:
    """Give a function that says how many graphs were compiled since; nothing that was compiled before is used."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    try:
        yield lambda: counters["stats"]["unique_graphs"]
    finally:
        torch._dynamo.reset()
        counters.clear()


@pytest.mark.parametrize(("name", "backend"), [("llama_gqa", "aot_eager"), ("gemma3", "eager")])
def test_a_compiled_step_is_one_graph_and_right(name: str, backend: str) -> None:
    dense = make_dense(name)
    cut, ids, made = make_cut(dense), texts(2), []
    for model in (dense, compressed(dense, cut)):
        cache = StaticCache(config=dense.config, max_cache_len=FAR)
        logits = [in_chunks(model, ids[:, :5], [5], cache)]
        with counted_graphs() as count:
            step = torch.compile(model.forward, backend=backend, fullgraph=True)
            logits += [step(input_ids=ids[:, t : t + 1], **given_cache(model, cache)).logits for t in range(5, FAR)]
            made.append(count())
    assert difference(torch.cat(logits, 1), reference_logits(dense, cut, ids)) <= CLOSE
    # As many as the dense model: sliding layers make more until their window is full; a token makes none.
    assert 1 <= made[1] == made[0] <= 3


@pytest.mark.parametrize(
    ("name", "exact", "options"),
    # A prompt in parts that is exact asks for the cache's length, which breaks graphs: left out.
    [
        ("llama_gqa", False, {}),
        ("llama_gqa", True, {}),
        ("gemma3", False, {}),
        ("gemma3", True, {}),
        ("gemma3", False, {"prefill_chunk_size": 5}),
    ],
)
def test_generate_compiles_its_steps_in_one_piece(name: str, exact: bool, options: dict[str, Any]) -> None:
    dense = make_dense(name)
    model, ids = compressed(dense, make_cut(dense), exact_prefill=exact), texts(2, PROMPT)
    options = {"cache_implementation": "static", **options}
    expected = generated(copy.deepcopy(model), ids, **options)
    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True  # `generate` compiles on GPUs only, unless told
    with counted_graphs() as count:
        assert torch.equal(generated(model, ids, compile_config=config, **options), expected)
        assert count() > 0


# Other ways to the same model -----------------------------------------------------------------------------------------


def test_a_deep_copy_is_a_model_of_its_own() -> None:
    dense = make_dense("llama_gqa")
    cut, ids = make_cut(dense), texts(2)
    model = compressed(dense, cut)
    copied = copy.deepcopy(model)
    for module in attention_modules(model):
        module.kv_projection.key_basis.zero_()
    assert difference(in_chunks(copied, ids, [20, 9]), reference_logits(dense, cut, ids)) <= CLOSE
