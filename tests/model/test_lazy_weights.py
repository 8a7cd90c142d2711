"""Weights that a model reads without calling their module are there when its layers run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import basiscli

SIZES: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def mamba2() -> nn.Module:
    """Return a model whose layers read `conv1d.weight` and never call `conv1d`."""
    config = transformers.Mamba2Config(
        **SIZES, num_hidden_layers=3, expand=2, num_heads=8, head_dim=8, state_size=8, n_groups=1, chunk_size=8
    )
    return transformers.Mamba2ForCausalLM(config)


def lfm2() -> nn.Module:
    """Return a model of convolutions and attention whose convolutions are read in the same way."""
    config = transformers.Lfm2Config(
        **SIZES, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        layer_types=["conv", "full_attention", "conv"], max_position_embeddings=64,
    )  # fmt: skip
    return transformers.Lfm2ForCausalLM(config)


def captured(model: nn.Module, name: str, ids: torch.Tensor, a: torch.Tensor) -> float:
    """Return the share of a module's inputs' variance that the rows of A hold, of the most that so many can."""
    rows: list[torch.Tensor] = []
    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _, args: rows.append(args[0].flatten(0, 1).double()))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    handle.remove()
    covariance = torch.cov(torch.cat(rows).T)
    best = torch.linalg.eigvalsh(covariance)[-len(a) :].sum()
    return float(torch.trace(a.double() @ covariance @ a.double().T) / best)


def test_eva_sees_what_the_model_sees(tmp_path: Path) -> None:
    ids = torch.randint(3, 96, (24, 32), generator=torch.Generator().manual_seed(5))
    save_file({"input_ids": ids}, tmp_path / "tokens.safetensors")
    for make, targets in ((mamba2, "in_proj"), (lfm2, "in_proj,q_proj,w1")):
        torch.manual_seed(0)
        model = make().float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
        model.save_pretrained(tmp_path / make.__name__)
        options: dict[str, Any] = {
            "method": "eva", "rank": 4, "calibration": tmp_path / "tokens.safetensors", "tokens": 768, "length": 32,
            "target_modules": targets, "parameters": {"rho": 1.0},
        }  # fmt: skip
        found = [
            basiscli.init(tmp_path / make.__name__, output=tmp_path / f"{make.__name__}-{n}", **options) for n in "ab"
        ]
        first, again = (load_file(one.adapter / "adapter_model.safetensors") for one in found)
        assert all(torch.equal(first[name], again[name]) for name in first)
        factors = {name: a for name, a in first.items() if "lora_A" in name}
        assert len(factors) >= 3
        for name, a in factors.items():
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            assert captured(model, module, ids, a) > 0.999, name
