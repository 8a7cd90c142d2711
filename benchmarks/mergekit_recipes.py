"""Recipes in mergekit's format against mergekit itself: `python benchmarks/mergekit_recipes.py [PYTHON]`.

Both run the same files over the same tiny models, which are made here; PYTHON is that of an environment with
mergekit 0.1.5 (by default one is made). The figure of a recipe is the largest ‖ours − theirs‖ / ‖theirs‖ of any tensor.
Rows of embeddings are compared by token: the order of added tokens differs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import CACHE, environment

ROOT = Path(__file__).parents[1]
WORK = CACHE / "recipes"
EXAMPLES = ROOT / "examples" / "recipes"
RESULTS = ROOT / "benchmarks" / "results" / "mergekit_recipes.json"
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
PAIR = "models: [{model: ./a, parameters: {weight: 0.6}}, {model: ./b, parameters: {weight: 0.4}}]"
MORE = {
    "linear": f"merge_method: linear\n{PAIR}\ndtype: float32",
    "task-arithmetic-fp16": (
        f"merge_method: task_arithmetic\nbase_model: ./base\n{PAIR}\ndtype: float32\nout_dtype: float16"
    ),
    "base-tokenizer": (
        "merge_method: task_arithmetic\nbase_model: ./base\ntokenizer: {source: base, pad_to_multiple_of: 64}\n"
        "models: [{model: ./chat, parameters: {weight: 0.6}}, {model: ./a, parameters: {weight: 0.4}}]\ndtype: float32"
    ),
    "token-sources": (
        "merge_method: linear\n"
        "models: [{model: ./a, parameters: {weight: 1}}, {model: ./chat, parameters: {weight: 2}}]\n"
        "tokenizer:\n  source: union\n  tokens:\n    new: {source: {kind: zero}}\n"
        '    "<|im_end|>": {source: {kind: model_token, model: ./a, token: the}, force: true}\ndtype: float32'
    ),
    "adapter": (
        "merge_method: linear\ndtype: float32\n"
        "models: [{model: ./a+./lora, parameters: {weight: 1}}, {model: ./b, parameters: {weight: 3}}]"
    ),
    "slices-of-task-vectors": (
        "merge_method: dare_ties\nbase_model: ./base\nslices:\n"
        "  - sources: [{model: ./base, layer_range: [0, 2]}, {model: ./a, layer_range: [1, 3]}]\n"
        "  - sources: [{model: ./base, layer_range: [2, 4]}, {model: ./b, layer_range: [0, 2]}]\n"
        "parameters: {density: 1, weight: [0.2, 0.8]}\ndtype: float32"
    ),
}
"""Beside the examples: what they leave out."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("python", nargs="?", type=Path, help="of an environment with mergekit")
    args = parser.parse_args()
    python = args.python or environment("mergekit", "mergekit==0.1.5") / "python"

    _make_models()
    recipes = {file.stem: file.read_text() for file in EXAMPLES.glob("*.yaml") if "merge_method" in file.read_text()}
    found: dict[str, Any] = {}
    for name, text in sorted((recipes | MORE).items()):
        (WORK / f"{name}.yaml").write_text(text + "\n")
        theirs, ours = WORK / f"theirs-{name}", WORK / f"ours-{name}"
        for folder in (theirs, ours):
            shutil.rmtree(folder, ignore_errors=True)
        mergekit = [python.with_name("mergekit-yaml"), f"{name}.yaml", theirs, "--quiet", "--lora-merge-cache", "cache"]
        _run([*mergekit, "--no-write-model-card"])
        _run([Path(sys.executable).with_name("basis"), "run", f"{name}.yaml", "-o", ours, "--quiet"])
        found[name] = _compare(theirs, ours)
    print("| recipe | tensors | largest relative difference | of |\n|---|--:|--:|---|")
    for name, one in found.items():
        print(f"| {name} | {one['tensors']} | {one['difference']:.1e} | `{one['of']}` |")
    RESULTS.write_text(json.dumps({"mergekit": "0.1.5", "recipes": found}, indent=1) + "\n")


def _run(command: list[str | Path]) -> None:
    done = subprocess.run([str(word) for word in command], cwd=WORK, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


def _make_models() -> None:
    """Make a base, fine-tunes of it, one with tokens of its own, and an adapter, all of four small layers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    torch.manual_seed(0)
    tokenizers = {name: _tokenizer() for name in ("base", "a", "b", "c", "chat")}
    tokenizers["chat"].add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    base: Any = None
    for name, tokenizer in tokenizers.items():
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False, max_position_embeddings=128,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.normal_(std=0.1)
                if base is not None:
                    start = base.state_dict()[key]
                    parameter.mul_(0.2)[: len(start)] += start
        base = model if base is None else base
        model.save_pretrained(WORK / name)
        tokenizer.save_pretrained(WORK / name)
    adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    for key, parameter in adapted.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(WORK / "lora")


def _tokenizer() -> Any:
    """Return a tokenizer of bytes and a few words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("a", "n"), ("an", "d")]
    words = [*letters, *("".join(pair) for pair in merges)]
    inner = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")


def _compare(theirs: Path, ours: Path) -> dict[str, Any]:
    their, our = _tensors(theirs), _tensors(ours)
    if their.keys() != our.keys():
        raise SystemExit(f"{ours.name}: other tensors: {sorted(their.keys() ^ our.keys())[:4]}")
    vocabularies = [_vocabulary(folder) for folder in (theirs, ours)]
    worst, of = 0.0, ""
    for name, x in their.items():
        y = our[name]
        if name in TABLES:
            if x.shape != y.shape or vocabularies[0].keys() != vocabularies[1].keys():
                raise SystemExit(f"{ours.name}: other tokens")
            order = sorted(vocabularies[0])
            x, y = (table[[words[token] for token in order]] for table, words in zip((x, y), vocabularies, strict=True))
        difference = float((x.double() - y.double()).norm() / x.double().norm().clamp_min(1e-30))
        if x.dtype != y.dtype:
            raise SystemExit(f"{ours.name}: {name} is {y.dtype}, theirs {x.dtype}")
        worst, of = max((worst, of), (difference, name))
    return {"tensors": len(their), "difference": worst, "of": of}


def _tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def _vocabulary(folder: Path) -> dict[str, int]:
    from transformers import AutoTokenizer

    found: dict[str, int] = AutoTokenizer.from_pretrained(folder).get_vocab()
    return found


if __name__ == "__main__":
    main()
