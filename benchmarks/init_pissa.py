"""PiSSA of SmolLM2 against PEFT, start to end: `python benchmarks/init_pissa.py [RANK]`.

Every side reads the checkpoint, decomposes all linear layers, and writes the adapter and the residual. The error is
that of the principal part s·B·A of some weights against the exact one in float64, relative.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from common import CACHE, measured, smollm2

RESULTS = Path(__file__).parent / "results" / "init_pissa.json"
ROUNDS = 2


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


def error(model: Path, adapter: Path, rank: int) -> float:
    """Return the largest relative error of the principal parts of five layers' weights."""
    import torch
    from safetensors.torch import load_file

    weights, factors = load_file(model / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    worst = 0.0
    for layer in (0, 7, 14, 21, 29):
        for module in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"):
            name = f"model.layers.{layer}.{module}"
            u, s, vh = torch.linalg.svd(weights[f"{name}.weight"].double(), full_matrices=False)
            exact = (u[:, :rank] * s[:rank]) @ vh[:rank]
            a, b = (factors[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
            worst = max(worst, float((b @ a - exact).norm() / exact.norm()))
    return worst


def main() -> None:
    """Run the sides in turn and print the table."""
    rank = int(sys.argv[1]) if len(sys.argv) > 1 else 16
    model = smollm2()
    out = CACHE / "pissa"
    basis = [sys.executable, "-m", "basiscli", "init", model, "--rank", str(rank), "--overwrite", "-q"]
    sides = {
        "basis": [*basis, "-o", out / "basis"],
        "basis --exact": [*basis, "--exact", "-o", out / "basis-exact"],
        "PEFT pissa": [sys.executable, __file__, "peft", model, out / "peft", str(rank), "pissa"],
        "PEFT pissa_niter_16": [sys.executable, __file__, "peft", model, out / "niter", str(rank), "pissa_niter_16"],
    }
    costs: dict[str, list[tuple[float, int]]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, command in sides.items():
            cost = measured(command, {"HF_HUB_OFFLINE": "1"})
            costs[name].append((cost.seconds, cost.peak_bytes))
    table = {}
    for name, command in sides.items():
        folder = Path(str(command[-1] if name.startswith("basis") else command[4]))
        table[name] = {
            "seconds": round(min(seconds for seconds, _ in costs[name]), 2),
            "peak_gb": round(min(peak for _, peak in costs[name]) / 1e9, 3),
            "error": error(model, folder / "adapter", rank),
        }
        row = table[name]
        print(f"{name:22} {row['seconds']:7.2f} s {row['peak_gb']:7.3f} GB  error {row['error']:.1e}")
    theirs, ours = table["PEFT pissa"], table["basis"]
    speed, memory = theirs["seconds"] / ours["seconds"], theirs["peak_gb"] / ours["peak_gb"]
    print(f"basis against PEFT pissa: {speed:.1f} times faster, memory 1/{memory:.1f}")
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    results[f"rank {rank}"] = table
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    subprocess.run(["rm", "-rf", out], check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["peft"]:
        with_peft(sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5])
    else:
        main()
