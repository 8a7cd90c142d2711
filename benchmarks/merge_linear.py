"""Linear merge of three SmolLM2 against mergekit and a plain copy: `python benchmarks/merge_linear.py`.

Each runs as the command a user would type, from start to written checkpoint, in turn, several times; the least wall
time and peak memory of each count. mergekit lives in an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from common import CACHE, Cost, best, environment, fine_tunes, measured

OUT = CACHE / "out"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    models = fine_tunes(args.dtype)
    mergekit = environment("mergekit", "mergekit==0.1.5")
    recipe = CACHE / f"linear-{args.dtype}.yaml"
    entries = [{"model": str(model), "parameters": {"weight": 1.0}} for model in models]
    recipe.write_text(json.dumps({"merge_method": "linear", "models": entries, "dtype": args.dtype}))
    basis = Path(sys.executable).with_name("basis")
    commands: dict[str, list[str | Path]] = {
        "cp": ["cp", models[0] / "model.safetensors", OUT],
        "basis": [basis, "merge", *models, "-m", "linear", "-o", OUT, "--quiet"],
        "mergekit": [mergekit / "mergekit-yaml", recipe, OUT, "--copy-tokenizer"],
        "basis --help": [basis, "--help"],
        "basis --version": [basis, "--version"],
        "python -c 'import torch'": [sys.executable, "-c", "import torch"],
        "mergekit-yaml --help": [mergekit / "mergekit-yaml", "--help"],
    }
    costs: dict[str, list[Cost]] = {name: [] for name in commands}
    for _ in range(args.runs):
        for name, command in commands.items():
            shutil.rmtree(OUT, ignore_errors=True)
            OUT.unlink(missing_ok=True)
            costs[name].append(measured(command, {"HF_HUB_OFFLINE": "1"}))
    found = {name: best(runs) for name, runs in costs.items()}
    print(f"linear merge of three SmolLM2-135M, {args.dtype}, best of {args.runs}\n")
    print("| command | wall | peak memory |\n|---|---|---|")
    for name, cost in found.items():
        print(f"| {name} | {cost.seconds:.2f} s | {cost.peak_bytes / 1e9:.2f} GB |")
    wall = found["mergekit"].seconds / found["basis"].seconds
    memory = found["mergekit"].peak_bytes / found["basis"].peak_bytes
    print(f"\nmergekit / basis: wall {wall:.1f}, peak memory {memory:.1f}")
    if args.json:
        args.json.write_text(json.dumps({name: cost._asdict() for name, cost in found.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
