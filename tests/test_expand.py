"""A trained PiSSA adapter as plain LoRA, and an adapter and its base as a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import basiscli
from basiscli.commands.init.api import InitResult

IDS = torch.arange(24)[None] % 60


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def trained(start: InitResult, out: Path, patterns: dict[str, Any] | None = None) -> torch.Tensor:
    """Train for a few steps as a user would, save, and return the logits at the end."""
    if patterns:
        file = start.adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | patterns))
    base = AutoModelForCausalLM.from_pretrained(start.residual)
    tuned = PeftModel.from_pretrained(base, start.adapter, is_trainable=True)
    optimiser = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.5)
    for _ in range(5):
        tuned(IDS, labels=IDS).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    tuned.eval().save_pretrained(out)
    return tuned(IDS).logits.detach()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("method", ["pissa", "milora", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_what_was_trained_on_the_residual_is_a_lora_of_twice_the_rank_on_the_original(
    model: Path, tmp_path: Path, method: str, rslora: bool
) -> None:
    start = basiscli.init(model, method=method, rank=4, alpha=7, rslora=rslora, output=tmp_path / "start")
    expected = trained(start, tmp_path / "trained")
    done = basiscli.expand(tmp_path / "trained", initial=start.adapter, output=tmp_path / "plain")
    original = AutoModelForCausalLM.from_pretrained(model)
    untouched = original(IDS).logits.detach()
    plain = PeftModel.from_pretrained(original, done.path)
    assert plain.peft_config["default"].r == 8
    assert plain.peft_config["default"].base_model_name_or_path == str(model)
    assert (untouched - expected).abs().max() > 0.01
    torch.testing.assert_close(plain(IDS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_of_alpha_survive(model: Path, tmp_path: Path, rslora: bool) -> None:
    start = basiscli.init(model, rank=4, rslora=rslora, output=tmp_path / "start")
    expected = trained(start, tmp_path / "trained", {"alpha_pattern": {"q_proj": 3.0}})
    done = basiscli.expand(tmp_path / "trained", initial=start.adapter, output=tmp_path / "plain")
    # Another scaling than the initialisation's: the difference from the residual is s(BA), from the start s(BA − B₀A₀).
    residual = AutoModelForCausalLM.from_pretrained(start.residual)
    weights = {name: parameter.detach() for name, parameter in residual.named_parameters()}
    old = load_file(start.adapter / "adapter_model.safetensors")
    for name, parameter in weights.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in old:
            scale = (3.0 if "q_proj" in name else 4.0) / (2 if rslora else 4)
            parameter += scale * old[f"{key}.lora_B.weight"] @ old[f"{key}.lora_A.weight"]
    plain = PeftModel.from_pretrained(residual, done.path)
    torch.testing.assert_close(plain(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_and_its_base_become_a_checkpoint(model: Path, tmp_path: Path) -> None:
    start = basiscli.init(model, rank=4, output=tmp_path / "start")
    done = basiscli.expand(start.adapter, output=tmp_path / "whole")
    assert done.kind == "checkpoint"
    for name, tensor in load_file(done.path / "model.safetensors").items():
        torch.testing.assert_close(tensor, load_file(model / "model.safetensors")[name], rtol=1e-5, atol=1e-6)


def test_adapters_that_do_not_belong_together_are_refused(model: Path, tmp_path: Path) -> None:
    one = basiscli.init(model, rank=4, output=tmp_path / "one")
    other = basiscli.init(model, rank=4, target_modules=["q_proj"], output=tmp_path / "other")
    larger = basiscli.init(model, rank=6, output=tmp_path / "larger")
    for initial, word in ((other.adapter, "only one"), (larger.adapter, "shapes differ"), (model, "not an adapter")):
        with pytest.raises(basiscli.InputError, match=word):
            basiscli.expand(one.adapter, initial=initial, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
    (one.adapter / "basis_report.json").unlink()
    with pytest.raises(basiscli.UsageError, match="which model"):
        basiscli.expand(one.adapter, initial=one.adapter, output=tmp_path / "out")
