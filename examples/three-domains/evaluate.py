"""Merge the three domain adapters by three methods and print perplexities: `python evaluate.py --base PATH`.

Every model is measured on held-out text of all three domains. About 20 minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path

import torch
from domains import DOMAINS, HERE, held_out_text
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import basiscli

MERGES = {
    "linear": {},
    "task_arithmetic": {"lambda": 1.0},
    "task_arithmetic λ=0.5": {"lambda": 0.5},
    "ortho": {"alpha": 0.5},
    "ortho α=0.2": {"alpha": 0.2},
    "ortho α=0.8": {"alpha": 0.8},
}


def perplexity(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Return exp of the mean negative log-likelihood over windows of tokens, each on its own."""
    with torch.inference_mode():
        losses = [model(input_ids=window[None], labels=window[None]).loss.item() for window in ids]
    return math.exp(sum(losses) / len(losses))


def main() -> None:
    """Print a Markdown table, and the same as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True, help="path or Hub id of SmolLM2-135M-Instruct")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.base)
    count = args.windows * args.length
    held_out = {
        domain: tokenizer(held_out_text(domain), return_tensors="pt")["input_ids"][0][:count].view(-1, args.length)
        for domain in DOMAINS
    }
    adapters = [HERE / "adapters" / domain for domain in DOMAINS]
    table: dict[str, dict[str, float]] = {}

    def measure(name: str, model: torch.nn.Module) -> None:
        table[name] = {domain: perplexity(model, ids) for domain, ids in held_out.items()}
        geometric = math.exp(sum(math.log(p) for p in table[name].values()) / len(DOMAINS))
        table[name]["mean"] = geometric
        print("| " + " | ".join([name, *(f"{value:.2f}" for value in table[name].values())]) + " |", flush=True)

    print("| model | " + " | ".join([*DOMAINS, "mean"]) + " |\n|" + "---|" * (len(DOMAINS) + 2))
    measure("base", AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32).eval())
    for domain, adapter in zip(DOMAINS, adapters, strict=True):
        base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
        measure(f"fine-tune {domain}", PeftModel.from_pretrained(base, adapter).eval())
    for name, parameters in MERGES.items():
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "merged"
            basiscli.merge(adapters, method=name.split()[0], parameters=parameters, base=args.base, output=out)
            measure(name, AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval())
    if args.json:
        args.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
