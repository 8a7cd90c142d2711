"""What a merge costs as checkpoints grow, against copying the same bytes: `python benchmarks/scale.py`.

`basis merge --method linear` of two random bfloat16 checkpoints of Llama's shapes, 0.25 to 4 GB each, beside `cp` and
`cat` that read and write as many bytes and wait for the disk as the merge does. Then, with `--methods`, the rates that
`--dry-run` prices with: every merge method, and PiSSA, on the smallest one. What is made is removed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import CACHE, Cost, best, measured

SIZES = (0.25, 0.5, 1, 2, 4)  # GB
HIDDEN, INNER, VOCABULARY = 2048, 5632, 8192
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
    "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": VOCABULARY, "tie_word_embeddings": False,
}  # fmt: skip
RESULTS = Path(__file__).parent / "results" / "scale.json"
WORK = CACHE / "scale"
BASIS = Path(sys.executable).with_name("basis")
REQUIRED = {"slerp": "t=0.5", "nearswap": "t=0.001"}  # parameters without a default


def layers_of(gigabytes: float) -> int:
    layer = 2 * (4 * HIDDEN**2 + 3 * HIDDEN * INNER + 2 * HIDDEN)
    return max(1, round((gigabytes * 1e9 - 2 * 2 * VOCABULARY * HIDDEN) / layer))


def make(folder: Path, layers: int, seed: int) -> int:
    """Write a random checkpoint and return its bytes.

    In a process of its own: a child's peak memory starts from what its parent holds.
    """
    subprocess.run([sys.executable, __file__, "--make", str(folder), str(layers), str(seed)], check=True)
    return (folder / "model.safetensors").stat().st_size


def _make(folder: Path, layers: int, seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).bfloat16()

    embedding = normal(VOCABULARY, HIDDEN)
    layer = {f"self_attn.{p}_proj": normal(HIDDEN, HIDDEN) for p in "qkvo"}
    layer |= {"mlp.gate_proj": normal(INNER, HIDDEN), "mlp.up_proj": normal(INNER, HIDDEN)}
    layer |= {"mlp.down_proj": normal(HIDDEN, INNER)}
    layer |= {"input_layernorm": normal(HIDDEN), "post_attention_layernorm": normal(HIDDEN)}
    tensors = {
        "model.embed_tokens.weight": embedding,
        "lm_head.weight": embedding.clone(),
        "model.norm.weight": normal(HIDDEN),
    }
    for number in range(layers):  # the same in every layer: random bytes cost more than the merge
        tensors |= {f"model.layers.{number}.{name}.weight": t.clone() for name, t in layer.items()}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def merged(models: list[Path], method: str, *words: str | Path) -> Cost:
    out = WORK / "out"
    shutil.rmtree(out, ignore_errors=True)
    return measured([BASIS, "merge", *models, "-m", method, "-o", out, "--quiet", *words], {"HF_HUB_OFFLINE": "1"})


def copied(models: list[Path]) -> Cost:
    """Read both files and write one, as the merge does, and wait until it is on the disk."""
    first, second = (model / "model.safetensors" for model in models)
    out = WORK / "copy"
    out.unlink(missing_ok=True)
    return measured(["sh", "-c", f"cp '{first}' '{out}' && cat '{second}' > /dev/null && sync '{out}'"])


def growth(runs: int) -> list[dict[str, Any]]:
    rows = []
    for size in SIZES:
        shutil.rmtree(WORK, ignore_errors=True)
        models = [WORK / "a", WORK / "b"]
        for seed, model in enumerate(models):
            nbytes = make(model, layers_of(size), seed)
        merges, copies = [], []
        for _ in range(runs):  # in turn: what else the machine does meets both
            copies.append(copied(models))
            merges.append(merged(models, "linear"))
        merge, copy = best(merges), best(copies)
        rows.append(
            {
                "bytes": nbytes, "merge": merge._asdict(), "cp": copy._asdict(),
                "ratio": merge.seconds / copy.seconds, "seconds_per_gb": 1e9 * merge.seconds / nbytes,
            }
        )  # fmt: skip
        print(
            f"| {nbytes / 1e9:.2f} GB | {merge.seconds:.1f} s | {merge.cpu_seconds:.1f} s | {copy.seconds:.1f} s | "
            f"{rows[-1]['ratio']:.2f} | {merge.peak_bytes / 1e6:.0f} MB |",
            flush=True,
        )
    return rows


def methods() -> dict[str, dict[str, float]]:
    """Return what each method takes for a base and two models of a quarter of a gigabyte, and PiSSA for one."""
    from basiscli.registry import Registry

    shutil.rmtree(WORK, ignore_errors=True)
    base, *models = (WORK / name for name in ("base", "a", "b"))
    nbytes = 0
    for seed, model in enumerate([base, *models]):
        nbytes = make(model, layers_of(SIZES[0]), seed)
    rows: dict[str, dict[str, float]] = {}
    for name in Registry().names("merge"):
        method = Registry().find("merge", name)
        most = method.models[1]
        chosen = models if most is None else models[:most]
        words: list[str | Path] = ["-p", REQUIRED[name]] if name in REQUIRED else []
        words += ["--base", base] if method.needs_base else []
        cost = merged(chosen, name, *words, "--workers", "1")
        rows[name] = {"models": len(chosen), **cost._asdict()}
        print(f"| {name} | {cost.cpu_seconds:.1f} s | {cost.peak_bytes / 1e6:.0f} MB |", flush=True)
    shutil.rmtree(WORK / "out")
    cost = measured([BASIS, "init", base, "-m", "pissa", "-o", WORK / "out", "--quiet", "--workers", "1"])
    rows["pissa"] = {"models": 1, **cost._asdict()}
    print(f"| pissa | {cost.cpu_seconds:.1f} s | {cost.peak_bytes / 1e6:.0f} MB |", flush=True)
    return {"bytes": {"bytes": nbytes}, **rows}


def kernels() -> dict[str, float]:
    """Return the operations a second of one core in what decompositions do, as `engine.pricing` counts them."""
    import torch

    from basiscli.engine import pricing
    from basiscli.linalg.projection import project_and_add
    from basiscli.linalg.svd import exact_svd, fast_svd

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    weight, update = (torch.randn(2816, 1024, generator=generator) for _ in range(2))
    square = update[:1024].contiguous()
    work = {
        "projection": (pricing.projection_flops(weight.shape), lambda: project_and_add(weight, update, 0.5, 0.0)),
        "exact": (pricing.exact_svd_flops(weight.shape, 16), lambda: exact_svd(weight, 16)),
        "fast": (pricing.fast_svd_flops(weight.shape, 16), lambda: fast_svd(weight, 16, seed=0)),
        "product": (2.0 * 1024**3, lambda: square @ square),
    }
    rates = {}
    for name, (flops, do) in work.items():
        times = []
        for _ in range(5):
            started = time.thread_time()
            do()
            times.append(time.thread_time() - started)
        rates[name] = flops / min(times)
        print(f"| {name} | {rates[name] / 1e9:.0f} GFLOP/s |", flush=True)
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--methods", action="store_true", help="measure the rates instead")
    parser.add_argument("--make", nargs=3, metavar=("FOLDER", "LAYERS", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        _make(Path(args.make[0]), int(args.make[1]), int(args.make[2]))
        return
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    machine = {"processors": os.cpu_count(), "processor": _processor(), "python": platform.python_version()}
    try:
        if args.methods:
            print("| what | rate or CPU time | peak memory |\n|---|---|---|")
            known |= {"kernels": kernels(), "methods": methods()}
        else:
            print(
                "| each of two models | merge | CPU time | cp | merge / cp | peak memory |\n|---|---|---|---|---|---|"
            )
            known |= {"growth": growth(args.runs)}
    finally:
        shutil.rmtree(WORK, ignore_errors=True)
    RESULTS.write_text(json.dumps(known | {"machine": machine}, indent=1) + "\n")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
