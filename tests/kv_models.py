"""Tiny random models of every architecture whose KV cache is compressed, saved as their makers would save them."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging

from basiscli.calibration.tokens import Windows

VOCABULARY = 260
END = 256
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # logits that differ, so that a wrong cache shows
    "bos_token_id": END,
    "eos_token_id": END,
    "pad_token_id": END,
}
WORDS = ["the river ", "a small boat ", "carries ", "no stone ", "two lanterns ", "under the bridge ", "at night.\n"]


def llama(**changes: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(**COMMON | changes))


ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama-mha": lambda: llama(num_key_value_heads=4),
    "llama-gqa": lambda: llama(head_dim=16, num_hidden_layers=3),
    "llama-bias": lambda: llama(attention_bias=True, tie_word_embeddings=True),
    "mistral-sliding": lambda: MistralForCausalLM(MistralConfig(**COMMON, head_dim=8, sliding_window=20)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**COMMON)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON, head_dim=16)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **COMMON | {"num_hidden_layers": 3},
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=20,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**COMMON)),
}


def make_model(name: str = "llama-gqa", seed: int = 0) -> Any:
    """Return a random model in evaluation mode; biases are random, too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ARCHITECTURES[name]()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith("bias"):
                    parameter.normal_(std=0.3)
    return model.eval().requires_grad_(False)


def save_model(folder: Path, model: Any, *, tokenizer: bool = True) -> Path:
    """Save a model as transformers does, and a tokenizer beside it."""
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    if bars:
        logging.enable_progress_bar()
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return folder


@cache
def byte_tokenizer() -> Any:
    """Return a tokenizer of one token a byte and one for the end of a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", model_max_length=64)


def make_text(letters: int = 3000, seed: int = 0) -> str:
    """Return words in a random order."""
    chosen, text = random.Random(seed), ""
    while len(text) < letters:
        text += chosen.choice(WORDS)
    return text[:letters]


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return a model's logits, without a cache."""
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def some_ids(count: int = 2, length: int = 32, seed: int = 1) -> torch.Tensor:
    """Return random tokens."""
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(seed))


def text_windows(count: int = 12, length: int = 32, seed: int = 0) -> Windows:
    """Return windows of that text's tokens."""
    ids = byte_tokenizer()(make_text(count * length, seed), return_tensors="pt", verbose=False)["input_ids"]
    ids = ids[0, : count * length].view(count, length)
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    return Windows(ids, labels, None, "words", "")


def random_bases(layers: int, heads: int, dim: int, seed: int = 0) -> torch.Tensor:
    """Return orthogonal bases [layers, 2, heads, dim, dim]."""
    free = torch.randn((layers, 2, heads, dim, dim), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(free)[0].float()
