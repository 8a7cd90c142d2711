"""What is done to an output head that is tied to the embedding is in the result, or refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import basiscli

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ADAPTERS: dict[str, dict[str, Any]] = {
    "factors": {"target_modules": ["lm_head", "q_proj"]},
    "replaced": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def base(folder: Path, *, stored: bool) -> Path:
    model().save_pretrained(folder)
    if stored:  # as many published checkpoints do
        tensors = load_file(folder / "model.safetensors")
        save_file(tensors | {HEAD: tensors[EMBEDDING].clone()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def adapter(folder: Path, on: Path, options: dict[str, Any], *, moved: float = 0.1) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's word on tied heads
        made = peft.get_peft_model(model(), peft.LoraConfig(r=2, **options))
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if parameter.requires_grad and ("lora_" in name or moved):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        made.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(on)}))
    return folder


@torch.no_grad()
def logits(of: torch.nn.Module) -> Tensor:
    return of.eval()(torch.arange(20)[None]).logits


def adapted(on: Path, folder: Path) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return logits(peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(on), folder))


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "not stored"])
@pytest.mark.parametrize("kind", sorted(ADAPTERS))
def test_an_adapter_of_a_tied_head_is_in_the_checkpoint(tmp_path: Path, kind: str, stored: bool) -> None:
    on = base(tmp_path / "base", stored=stored)
    lora = adapter(tmp_path / "ad", on, ADAPTERS[kind])
    expected = adapted(on, lora)
    assert (logits(LlamaForCausalLM.from_pretrained(on)) - expected).abs().max() > 0.1
    made = basiscli.expand(lora, output=tmp_path / "out")
    found = logits(LlamaForCausalLM.from_pretrained(made.path))
    assert (found - expected).abs().max() < 1e-5
    assert json.loads((made.path / "config.json").read_text())["tie_word_embeddings"] is False
    assert json.loads((on / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "not stored"])
def test_with_others_it_is_merged_as_any_weight(tmp_path: Path, stored: bool) -> None:
    """The other adapter, and a whole fine-tune that stores its embedding alone, leave the head as it was."""
    on = base(tmp_path / "base", stored=stored)
    first = adapter(tmp_path / "plain", on, {"target_modules": ["v_proj"]})
    lora = adapter(tmp_path / "ad", on, ADAPTERS["factors"])
    whole = base(tmp_path / "whole", stored=False)
    made = basiscli.merge(
        [first, lora, whole], base=on, method="task_arithmetic", weights=[1, 0.5, 1],
        output=tmp_path / "out",
    )  # fmt: skip
    start, result = load_file(on / "model.safetensors")[EMBEDDING], load_file(made.path / "model.safetensors")
    factors = load_file(lora / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.lm_head.lora_{x}.weight"].double() for x in "AB")
    scale = 8 / 2  # PEFT's α over the rank
    assert torch.allclose(result[HEAD].double(), start.double() + 0.5 * scale * b @ a, atol=1e-6)
    assert torch.equal(result[EMBEDDING], start)
    assert any("written on its own" in note for note in made.report.notes)


def test_a_fine_tune_with_a_head_of_its_own_keeps_it(tmp_path: Path) -> None:
    on = base(tmp_path / "base", stored=True)
    tuned = base(tmp_path / "tuned", stored=True)
    tensors = load_file(tuned / "model.safetensors")
    tensors[HEAD] += 0.5
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    (tuned / "config.json").write_text(
        json.dumps(json.loads((tuned / "config.json").read_text()) | {"tie_word_embeddings": False})
    )
    made = basiscli.merge([tuned], base=on, method="task_arithmetic", parameters={"lambda": 1}, output=tmp_path / "out")
    found = load_file(made.path / "model.safetensors")
    assert torch.allclose(found[HEAD], tensors[HEAD], atol=1e-6)
    assert torch.equal(found[EMBEDDING], tensors[EMBEDDING])
    assert json.loads((made.path / "config.json").read_text())["tie_word_embeddings"] is False


def test_heads_that_are_saved_alike_stay_tied(tmp_path: Path) -> None:
    on = base(tmp_path / "base", stored=True)
    lora = adapter(tmp_path / "ad", on, ADAPTERS["replaced"], moved=0.0)
    made = basiscli.expand(lora, output=tmp_path / "out")
    assert HEAD not in load_file(made.path / "model.safetensors")
    assert json.loads((made.path / "config.json").read_text())["tie_word_embeddings"] is True


def test_an_encoder_decoders_head_is_refused(tmp_path: Path) -> None:
    """T5 scales what goes into a head only where it is tied: untied, it would be another model."""
    on = base(tmp_path / "base", stored=True)
    (on / "config.json").write_text(
        json.dumps(json.loads((on / "config.json").read_text()) | {"is_encoder_decoder": True})
    )
    lora = adapter(tmp_path / "ad", on, ADAPTERS["factors"])
    with pytest.raises(basiscli.InputError, match="ties to its embedding"):
        basiscli.expand(lora, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
