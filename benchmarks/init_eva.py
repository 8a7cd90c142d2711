"""EVA of SmolLM2 against PEFT and an exact PCA: `python benchmarks/init_eva.py [--windows N] [--rounds N]`.

Both sides get the same tokens, as of a fine-tune: the first labels of each window are −100, every fourth window is
padded. Each runs on one thread in a process of its own and writes its adapter; PEFT cycles its loader until its
components stop turning. Both are then held against the principal components of float64 covariances, taken with hooks on
the whole model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from itertools import cycle, islice
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from common import CACHE, Cost, best, measured, smollm2

if TYPE_CHECKING:
    from torch import Tensor

RESULTS = Path(__file__).parent / "results" / "init_eva.json"
RHO = 2.0
BATCH = 4
PROMPT = 32
_IMPORTS = "import torch, transformers.models.llama.modeling_llama"


def write_tokens(model: str, file: str, windows: int, length: int) -> None:
    """Write windows of the built-in calibration mix, a prompt's labels in each, padding in every fourth."""
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from basiscli.calibration.tokens import read_windows

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = read_windows(None, lambda: tokenizer, length, len(tokenizer)).ids
    if len(ids) < windows:
        raise SystemExit(f"the built-in mix has {len(ids)} windows of {length}")
    ids = ids[:: len(ids) // windows][:windows].contiguous()
    mask = ids.new_ones(ids.shape)
    mask[3::4, length * 3 // 4 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :PROMPT] = -100
    save_file({"input_ids": ids, "attention_mask": mask, "labels": labels}, file)


def with_peft(model: str, tokens: str, out: str, rank: int) -> None:
    """Do it as PEFT's documentation says."""
    import torch
    from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules="all-linear",
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=RHO),
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(base, config, low_cpu_mem_usage=True)
    stored = load_file(tokens)
    loader = [
        dict(zip(stored, parts, strict=True)) for parts in zip(*(t.split(BATCH) for t in stored.values()), strict=True)
    ]
    forwards = Counter[str]()

    def forward(whole: Any, inputs: dict[str, Tensor]) -> Any:
        forwards["tokens"] += inputs["input_ids"].numel()
        return whole(**inputs)

    initialize_lora_eva_weights(adapted, loader, forward_fn=forward, show_progress_bar=False)
    adapted.save_pretrained(out)
    (Path(out) / "forwards.json").write_text(json.dumps(forwards))


def covariances(model: str, tokens: str) -> dict[str, Tensor]:
    """Return the covariance of every linear layer's inputs, float64, of the tokens that count; layers share equals."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    names = [name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"]
    stored = load_file(tokens)
    sums: dict[str, list[Any]] = {}
    same: dict[str, str] = {}
    last: list[Any] = [None, ""]
    counts = torch.ones(0, dtype=torch.bool)

    def hook(name: str) -> Any:
        def add(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            if args[0] is last[0]:
                same[name] = last[1]
                return
            last[:] = [args[0], name]
            rows = args[0][counts].double()
            entry = sums.setdefault(name, [0, 0.0, 0.0])
            entry[0] += len(rows)
            entry[1] = entry[1] + rows.sum(0)
            entry[2] = entry[2] + rows.mT @ rows

        return add

    for name in names:
        base.get_submodule(name).register_forward_pre_hook(hook(name))
    with torch.inference_mode():
        for place in range(len(stored["input_ids"])):
            one = {name: values[place : place + 1] for name, values in stored.items()}
            counts = (one["attention_mask"] == 1) & (one.pop("labels") != -100)
            base.model(**one, use_cache=False)
    found = {name: second - total[:, None] * total / count for name, (count, total, second) in sums.items()}
    return {name: found[same.get(name, name)] for name in names}


def exact_axes(found: dict[str, Tensor], count: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each module's leading eigenvectors as rows and their shares of the variance; equal inputs share them."""
    import torch

    distinct: dict[int, tuple[Tensor, Tensor]] = {}
    for covariance in found.values():
        if id(covariance) not in distinct:
            values, vectors = torch.linalg.eigh(covariance)
            distinct[id(covariance)] = vectors[:, -count:].flip(-1).mT, values[-count:].flip(0) / covariance.trace()
    return {name: distinct[id(covariance)] for name, covariance in found.items()}


def best_ranks(shares: dict[str, list[float]], budget: int) -> dict[str, int]:
    """Return how many of each module's shares are among the best of the whole model."""
    order = sorted(((share, name) for name, own in shares.items() for share in own), key=lambda pair: -pair[0])
    kept = Counter(name for _, name in order[:budget])
    return {name: kept[name] for name in shares}


def compare(model: str, tokens: str, rank: int, folders: dict[str, str]) -> dict[str, dict[str, float]]:
    """Return figures of each adapter against the exact components."""
    import torch
    from safetensors.torch import load_file

    found = covariances(model, tokens)
    exact = exact_axes(found, round(RHO * rank))
    budget = rank * len(exact)
    ranks = best_ranks({name: shares.tolist() for name, (_, shares) in exact.items()}, budget)
    most = sum(float(exact[name][1][:r].sum()) for name, r in ranks.items())
    table = {}
    for side, folder in folders.items():
        stored = load_file(Path(folder) / "adapter_model.safetensors")
        report = Path(folder) / "basis_report.json"
        reported = json.loads(report.read_text())["adapter"]["modules"] if report.is_file() else {}
        overlaps, errors, kept, explained, off = [], [], {}, 0.0, 0.0
        for name, (axes, shares) in exact.items():
            own = stored.get(f"base_model.model.{name}.lora_A.weight")
            kept[name] = r = 0 if own is None else len(own)
            if own is None or not r:
                continue
            rows = torch.linalg.qr(own.double().mT)[0].mT
            overlaps.append(float((rows @ axes[:r].mT).square().sum()) / r)
            along = ((own.double() @ found[name]) * own).sum(1) / own.double().square().sum(1) / found[name].trace()
            errors.append(float((along / shares[:r] - 1).abs().max()))
            explained += float((rows @ found[name] @ rows.mT).trace() / found[name].trace())
            if reported:
                off = max(off, abs(reported[name]["energy"] / float(shares[:r].sum()) - 1))
        table[side] = {
            "overlap_least": min(overlaps),
            "overlap_mean": mean(overlaps),
            "rank_total": sum(kept.values()),
            "rank_difference": sum(abs(kept[name] - ranks[name]) for name in ranks) / 2 / budget,
            "modules_of_other_rank": sum(kept[name] != ranks[name] for name in ranks),
            "variance_ratio_error_most": max(errors),
            "explained_of_best": explained / most,
        } | ({"reported_energy_error_most": off} if reported else {})
    return table


def in_process(*words: str | Path | int) -> str:
    """Run a part of this file in a process of its own: what this process holds would count in a child's peak."""
    command = [sys.executable, __file__, *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    """Run both sides in turn, compare, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--sides",
        nargs="+",
        default=["basis", "PEFT"],
        choices=["basis", "PEFT"],
        help="one alone: the other's figures stay",
    )
    args = parser.parse_args()

    model, out = smollm2(), CACHE / f"eva-{os.getpid()}"
    out.mkdir(parents=True, exist_ok=True)
    tokens = out / "tokens.safetensors"
    in_process("tokens", model, tokens, args.windows, args.length)
    basis = [sys.executable, "-m", "basiscli", "init", model, "--method", "eva", "--rank", str(args.rank)]
    basis += ["-p", f"rho={RHO}", "--workers", "1", "--overwrite", "-q", "-o", out / "basis", "--calibration", tokens]
    basis += ["--tokens", str(args.windows * args.length), "--length", str(args.length)]
    commands: dict[str, list[str | Path]] = {
        "basis": basis,
        "PEFT": [sys.executable, __file__, "peft", model, tokens, out / "peft", str(args.rank)],
    }
    imports: dict[str, list[str | Path]] = {
        "basis": [sys.executable, "-c", f"{_IMPORTS}, basiscli"],
        "PEFT": [sys.executable, "-c", f"{_IMPORTS}, peft"],
    }
    folders = {"basis": out / "basis" / "adapter", "PEFT": out / "peft"}
    costs: dict[str, list[Cost]] = {side: [] for side in args.sides}
    for side in islice(cycle(args.sides), args.rounds * len(args.sides)):
        costs[side].append(measured(commands[side], {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}))
    chosen = [f"{side}={folders[side]}" for side in args.sides]
    accuracy = json.loads(in_process("compare", model, tokens, args.rank, *chosen))

    settings = {"rank": args.rank, "rho": RHO, "windows": args.windows, "length": args.length, "batch": BATCH}
    table: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    table = table if table.get("settings") == settings else {"settings": settings}
    for side in args.sides:
        cost, alone = best(costs[side]), measured(imports[side])
        table[side] = {
            "seconds": round(cost.seconds, 1),
            "cpu_seconds": round(cost.cpu_seconds, 1),
            "peak_gb": round(cost.peak_bytes / 1e9, 3),
            "peak_beyond_imports_gb": round((cost.peak_bytes - alone.peak_bytes) / 1e9, 3),
            **accuracy[side],
        }
    if "PEFT" in args.sides:
        table["PEFT"]["tokens_run"] = json.loads((folders["PEFT"] / "forwards.json").read_text())["tokens"]
    RESULTS.write_text(json.dumps(table, indent=1) + "\n")
    shutil.rmtree(out)
    show(table)


def show(table: dict[str, Any]) -> None:
    """Print the table of the sides that are there."""
    settings = table["settings"]
    sides = {side: table[side] for side in ("basis", "PEFT") if side in table}
    print(f"EVA of SmolLM2-135M, {json.dumps(settings)}\n")
    print("| | " + " | ".join(sides) + " |\n" + "|---" * (len(sides) + 1) + "|")
    for name in dict.fromkeys(name for row in sides.values() for name in row):
        print(f"| {name} | " + " | ".join(f"{row[name]:.6g}" if name in row else "" for row in sides.values()) + " |")
    if len(sides) == 2:
        ratios = [
            f"{name} {sides['PEFT'][name] / sides['basis'][name]:.1f}"
            for name in ("seconds", "cpu_seconds", "peak_gb", "peak_beyond_imports_gb")
        ]
        print("\nPEFT / basis: " + ", ".join(ratios))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["tokens", place, target, windows, length]:
            write_tokens(place, target, int(windows), int(length))
        case ["peft", place, calibration, target, rank]:
            with_peft(place, calibration, target, int(rank))
        case ["compare", place, calibration, rank, *sides]:
            pairs = dict(side.split("=", 1) for side in sides)
            print(json.dumps(compare(place, calibration, int(rank), pairs)))
        case _:
            main()
