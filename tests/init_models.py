"""Tiny models of transformers for the tests of `init` and `extract`, and how stock PEFT sees what they make."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from basiscli import InitResult

# peft 0.21 calls what transformers 5 renamed.
quiet_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
IDS = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(0))
Make = Callable[..., nn.Module]
_LLAMA: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
_BERT: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4
}  # fmt: skip


def llama(**options: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LLAMA | options))


def qwen2() -> nn.Module:
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_LLAMA))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)  # they begin as zeros
    return model


def gpt2() -> nn.Module:
    sizes = {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**_BERT))


def bert_classifier() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**_BERT))


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**_LLAMA, num_local_experts=4))


def save(make: Make, folder: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    torch.manual_seed(0)
    make(**options).to(dtype).save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    """Load a checkpoint by the class that its config names."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder).eval()


def answer(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out = model(input_ids=IDS)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def off(found: Tensor, expected: Tensor) -> float:
    """Return the relative distance of two tensors."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def with_peft(base: Path, adapter: Path, **options: Any) -> Any:
    return PeftModel.from_pretrained(load(base), adapter, **options)


def check_pair(model: Path, result: InitResult, tolerance: float = 1e-5, apart: float = 1e-3) -> None:
    """Check that stock PEFT makes the model of the two parts, and that the residual alone is not the model."""
    assert result.residual is not None
    expected, pair = answer(load(model)), with_peft(result.residual, result.adapter)
    assert off(answer(pair), expected) < tolerance
    with pair.disable_adapter():
        assert off(answer(pair), expected) > apart


def factors(adapter: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (B, A) by module."""
    stored = load_file(adapter / "adapter_model.safetensors")
    modules = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in stored}
    return {
        m: (stored[f"base_model.model.{m}.lora_B.weight"], stored[f"base_model.model.{m}.lora_A.weight"])
        for m in sorted(modules)
    }


class Interrupts:
    """Progress that presses Ctrl-C after so many pieces of work."""

    def __init__(self, after: int) -> None:
        self.left = after

    def start(self, what: str, tasks: int, size: int, unit: str = "bytes") -> None: ...

    def advance(self, size: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt

    def note(self, text: str) -> None: ...

    def stop(self) -> None: ...


def shards_of(folder: Path) -> dict[str, bytes]:
    """Return what is in every weights file and index under a folder."""
    found = sorted(file for file in folder.rglob("*") if ".safetensors" in file.name)
    return {os.path.relpath(file, folder): file.read_bytes() for file in found}
