"""PiSSA of SmolLM2 against PEFT, start to end: `python benchmarks/init_pissa.py [RANK]`.

Every side reads the checkpoint, decomposes all linear layers on one thread, and writes the adapter and the residual.
Error and angle are the largest of some weights: the relative error of the principal part s·B·A against the exact one in
float64, and the largest principal angle between their column spaces or row spaces.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

from common import CACHE, Cost, best, measured, smollm2

RESULTS = Path(__file__).parent / "results" / "init_pissa.json"
ROUNDS = 2
LAYERS = (0, 7, 14, 21, 29)
MODULES = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")


def with_peft(model: str, out: str, rank: int, how: str) -> None:
    """Do it as PEFT's documentation says."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules="all-linear", init_lora_weights=how, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(base, config)
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(f"{out}/adapter")
    adapted.unload().save_pretrained(f"{out}/residual")


def accuracy(model: Path, adapter: Path, rank: int) -> dict[str, float]:
    """Return the largest relative error of the principal parts and the largest principal angle in degrees."""
    import torch
    from safetensors.torch import load_file

    weights, factors = load_file(model / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    error = angle = 0.0
    for name in (f"model.layers.{layer}.{module}" for layer in LAYERS for module in MODULES):
        u, s, vh = torch.linalg.svd(weights[f"{name}.weight"].double(), full_matrices=False)
        exact = (u[:, :rank] * s[:rank]) @ vh[:rank]
        a, b = (factors[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
        error = max(error, float((b @ a - exact).norm() / exact.norm()))
        for exact_axes, own in ((u[:, :rank], b), (vh[:rank].mT, a.mT)):
            axes = torch.linalg.qr(own)[0]
            # By the sine: of a small angle, the cosine rounds to one.
            sine = float(torch.linalg.matrix_norm(axes - exact_axes @ (exact_axes.mT @ axes), 2))
            angle = max(angle, math.degrees(math.asin(min(1.0, sine))))
    return {"error": error, "angle": angle}


def main() -> None:
    """Run the sides in turn and print the table."""
    rank = int(sys.argv[1]) if len(sys.argv) > 1 else 16
    model = smollm2()
    out = CACHE / "pissa"
    basis = [sys.executable, "-m", "basiscli", "init", model, "--rank", str(rank), "--workers", "1"]
    basis += ["--overwrite", "-q"]
    sides = {
        "basis": [*basis, "-o", out / "basis"],
        "basis --exact": [*basis, "--exact", "-o", out / "basis-exact"],
        "PEFT pissa": [sys.executable, __file__, "peft", model, out / "peft", str(rank), "pissa"],
        "PEFT pissa_niter_16": [sys.executable, __file__, "peft", model, out / "niter", str(rank), "pissa_niter_16"],
    }
    costs: dict[str, list[Cost]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, command in sides.items():
            costs[name].append(measured(command, {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}))
    table = {}
    for name, command in sides.items():
        folder = Path(str(command[-1] if name.startswith("basis") else command[4]))
        cost = best(costs[name])
        table[name] = {"seconds": round(cost.seconds, 2), "cpu_seconds": round(cost.cpu_seconds, 2)}
        table[name] |= {"peak_gb": round(cost.peak_bytes / 1e9, 3)}
        table[name] |= accuracy(model, folder / "adapter", rank)
        row = table[name]
        print(
            f"{name:20} {row['seconds']:7.2f} s (CPU {row['cpu_seconds']:.2f} s) {row['peak_gb']:7.3f} GB  "
            f"error {row['error']:.1e}  angle {row['angle']:.1e}°"
        )
    theirs, ours = table["PEFT pissa"], table["basis"]
    speed, memory = theirs["cpu_seconds"] / ours["cpu_seconds"], theirs["peak_gb"] / ours["peak_gb"]
    print(f"basis against PEFT pissa: {speed:.1f} times faster in processor time, memory 1/{memory:.1f}")
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    results[f"rank {rank}"] = table
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    shutil.rmtree(out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["peft"]:
        with_peft(sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5])
    else:
        main()
