"""Models for recipes: plain tensors of a few layers, and tiny Llamas with tokenizers that differ in some tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import AddedToken
from torch import Tensor

from basiscli.errors import InputError
from tests.conftest import Tensors, add, write_checkpoint
from tests.kv_models import byte_tokenizer, llama, save_model

LAYERS = 4
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": LAYERS,
    "tie_word_embeddings": False,
    "vocab_size": 12,
}


def layered(seed: int, layers: int = LAYERS) -> Tensors:
    """Return the tensors of a model of a few layers."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {"model.embed_tokens.weight": normal(12, 8)}
    for layer in range(layers):
        tensors[f"model.layers.{layer}.self_attn.q_proj.weight"] = normal(8, 8)
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"] = normal(6, 8)
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = normal(8)
    return tensors | {"model.norm.weight": normal(8), "lm_head.weight": normal(12, 8)}


def write_family(folder: Path, names: str = "ab", **config: Any) -> dict[str, Tensors]:
    """Write a base and fine-tunes of it as folders `base`, `a`, `b`…; return their tensors."""
    tensors = {"base": layered(0)}
    tensors |= {name: add(tensors["base"], layered(seed), 0.2) for seed, name in enumerate(names, start=1)}
    for name, one in tensors.items():
        write_checkpoint(folder / name, one, CONFIG | config)
    return tensors


def write_recipe(folder: Path, recipe: Mapping[str, Any] | str, name: str = "recipe.yaml") -> Path:
    """Write a recipe and return its path."""
    file = folder / name
    file.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(dict(recipe), sort_keys=False))
    return file


def write_llama(
    folder: Path,
    seed: int,
    tokens: Sequence[str] = (),
    *,
    rows: int | None = None,
    chat: str | None = None,
    **config: Any,
) -> Any:
    """Write a tiny Llama with the byte tokenizer and some more tokens (special where written `<|…|>`)."""
    tokenizer = _copy(byte_tokenizer(), folder)
    tokenizer.add_tokens([AddedToken(one, special=one.startswith("<|"), normalized=False) for one in tokens])
    tokenizer.chat_template = chat
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = llama(vocab_size=rows or len(tokenizer), pad_token_id=None, **config).eval()
    save_model(folder, model, tokenizer=False)
    tokenizer.save_pretrained(folder)
    return model


def _copy(tokenizer: Any, folder: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def refused(act: Callable[[], Any], *parts: str) -> InputError:
    """Run something that must be refused as bad input, in words that hold all the parts."""
    try:
        act()
    except InputError as error:
        assert error.exit_code == 3
        for part in parts:
            assert part in str(error), str(error)
        return error
    raise AssertionError("nothing was refused")


def config_of(folder: Path) -> Any:
    """Return a model's configuration."""
    return json.loads((folder / "config.json").read_text())
