"""Tiny models of the kinds that people have, whose names or kinds of layers cannot be read off the files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

TEXT: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 64, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
IDS = torch.arange(9, 21)[None]
PIXELS = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)


def llava() -> nn.Module:
    """Return a vision-language model: `language_model.model.…` on disk, `model.language_model.…` when loaded."""
    config = transformers.LlavaConfig(
        text_config={**TEXT, "model_type": "llama"},
        vision_config={**VISION, "model_type": "clip_vision_model", "projection_dim": 16},
        image_token_index=5,
    )
    return transformers.LlavaForConditionalGeneration(config)


def deepseek() -> nn.Module:
    """Return a mixture with a dense first layer and shared experts, whose layers have the experts' names."""
    config = transformers.DeepseekV3Config(
        **{k: v for k, v in TEXT.items() if k not in {"head_dim", "num_key_value_heads"}}, n_routed_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=16, n_shared_experts=1, first_k_dense_replace=1, n_group=1,
        topk_group=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config)


def granite_moe() -> nn.Module:
    """Return a mixture whose router is `router.layer` on disk, and no linear layer when loaded."""
    config = transformers.GraniteMoeConfig(
        **{k: v for k, v in TEXT.items() if k != "head_dim"}, num_local_experts=4, num_experts_per_tok=2
    )
    return transformers.GraniteMoeForCausalLM(config)


def nemotron() -> nn.Module:
    """Return a hybrid: `backbone.…` on disk, Mamba's mixers, attention, experts that PEFT does not know."""
    config = transformers.NemotronHConfig(
        **{k: v for k, v in TEXT.items() if k != "num_hidden_layers"}, layers_block_type=["mamba", "attention", "moe"],
        mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=8, n_groups=1, chunk_size=8, n_routed_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=16, moe_shared_expert_intermediate_size=16, n_group=1,
        topk_group=1,
    )  # fmt: skip
    return transformers.NemotronHForCausalLM(config)


def vit() -> nn.Module:
    """Return an encoder of images: `attention.attention.query` on disk, `attention.q_proj` when loaded."""
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VISION, num_labels=3))


def vit_gpt2() -> nn.Module:
    """Return an encoder-decoder whose decoder has GPT-2's Conv1D, stored [in, out]."""
    decoder = transformers.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, add_cross_attention=True, is_decoder=True,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**VISION), decoder
    )
    return transformers.VisionEncoderDecoderModel(config)


def siglip() -> nn.Module:
    """Return a model with an `nn.MultiheadAttention`, which reads `out_proj.weight` and does not call `out_proj`."""
    text = {
        "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=VISION))


INPUTS: dict[Callable[[], nn.Module], dict[str, Any]] = {
    llava: {"input_ids": IDS}, deepseek: {"input_ids": IDS}, granite_moe: {"input_ids": IDS},
    nemotron: {"input_ids": IDS}, vit: {"pixel_values": PIXELS},
    vit_gpt2: {"pixel_values": PIXELS, "decoder_input_ids": IDS}, siglip: {"pixel_values": PIXELS, "input_ids": IDS},
}  # fmt: skip
"""Each kind of model, and what it is called with."""


def save(make: Callable[[], nn.Module], folder: Path, *, moved: float = 0.0) -> Path:
    """Save a model as transformers does; `moved` adds noise of this size to its weights, for a fine-tune."""
    torch.manual_seed(0)
    model = make().float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * moved)
    model.save_pretrained(folder)
    return folder


def answer(make: Callable[[], nn.Module], model: Any) -> torch.Tensor:
    """Return what a model says to its inputs."""
    with torch.no_grad():
        said = model(**INPUTS[make])
    return next(said[key] for key in ("logits", "last_hidden_state", "logits_per_image") if key in said)
