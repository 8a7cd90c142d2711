"""A checkpoint's headers without its data, to price on paper: `python benchmarks/headers.py 405B FOLDER`.

Shapes of Llama 3.1; the files are real safetensors headers in shards of 5 GB, and end where the data would begin.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from basiscli.checkpoints.header import TensorSpec
from basiscli.checkpoints.layout import Layout

SHAPES = {  # hidden, inner, layers, heads, key-value heads
    "8B": (4096, 14336, 32, 32, 8),
    "70B": (8192, 28672, 80, 64, 8),
    "405B": (16384, 53248, 126, 128, 8),
}
VOCABULARY = 128256


def write_headers(size: str, folder: Path) -> int:
    """Write the headers and the configuration; return the number of parameters."""
    hidden, inner, layers, heads, shared = SHAPES[size]
    narrow = hidden // heads * shared
    layer = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (VOCABULARY, hidden)}
    for number in range(layers):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    shapes |= {"model.norm": (hidden,), "lm_head": (VOCABULARY, hidden)}
    specs = [TensorSpec(f"{name}.weight", "BF16", shape) for name, shape in shapes.items()]
    layout = Layout.plan(specs, 5_000_000_000)
    folder.mkdir(parents=True)
    for shard in layout.shards:
        (folder / shard.file).write_bytes(shard.header[0])
    for name, index in layout.indexes().items():
        (folder / name).write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": shared,
        "vocab_size": VOCABULARY, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return sum(spec.count for spec in specs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    print(f"{write_headers(given.size, given.folder) / 1e9:.1f} billion parameters in {given.folder}")
