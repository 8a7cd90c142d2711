"""Fine-tune SmolLM2 on one text from three starts of the same rank: `python finetune.py MODEL -o OUT`.

LoRA from zero, PiSSA and EVA see the same batches in the same order. OUT gets one JSON file of losses a method and
`curves.svg`; a method whose file is there is not trained again. About 15 minutes a method on one CPU core.

A method may carry a rank, and NOLA its number of bases a factor: `--methods lora-r1 lora-r8 nola-r8-k363`.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

import basiscli
from basiscli import NolaConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "three-domains"))
from domains import DOMAINS, held_out_text, training_text

COLOURS = {"lora": "#999999", "pissa": "#d55e00", "eva": "#0072b2"}  # told apart in all kinds of colour vision
CALIBRATION_WINDOWS = 64
METHOD = re.compile(r"(?P<name>[a-z]+)(-r(?P<rank>\d+))?(-k(?P<bases>\d+))?")


def windows(tokenizer: Any, text: str, length: int) -> Tensor:
    """Return the text's tokens as [windows, length]."""
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    return ids[: len(ids) // length * length].view(-1, length)


def training_batches(tokenizer: Any, args: argparse.Namespace) -> Tensor:
    """Return [steps, batch, length] tokens of shuffled training text, the same for every method."""
    needed = args.steps * args.batch
    # A prefix of the text holds far more tokens than the steps use.
    found = windows(tokenizer, training_text(args.domain)[: 12 * needed * args.length], args.length)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(args.seed))
    return found[order[torch.arange(needed) % len(order)]].view(args.steps, args.batch, args.length)


def adapted(method: str, args: argparse.Namespace, batches: Tensor) -> PeftModel:
    """Return the model with a trainable adapter of one method on all its linear layers, scaling 1."""
    found = METHOD.fullmatch(method)
    assert found is not None  # `main` has seen to it
    start, method, rank = args.output / "starts" / method, found["name"], int(found["rank"] or args.rank)
    if method in ("lora", "nola"):
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        everywhere = {"r": rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        if method == "lora":
            return get_peft_model(model, LoraConfig(lora_alpha=rank, lora_dropout=0.0, **everywhere))
        config = NolaConfig(num_bases=int(found["bases"] or 1024), nola_alpha=rank, seed=args.seed, **everywhere)
        return get_peft_model(model, config)
    if method == "eva":
        # The start sees the first windows that training will see, and no others.
        calibration = args.output / "starts" / "calibration.safetensors"
        calibration.parent.mkdir(parents=True, exist_ok=True)
        save_file({"input_ids": batches.flatten(0, 1)[:CALIBRATION_WINDOWS].contiguous()}, calibration)
        made = basiscli.init(
            args.model, method=method, rank=rank, calibration=calibration, output=start, overwrite=True
        )
    else:
        made = basiscli.init(args.model, method=method, rank=rank, output=start, overwrite=True)
    base = AutoModelForCausalLM.from_pretrained(made.residual or args.model, dtype=torch.float32)
    return PeftModel.from_pretrained(base, made.adapter, is_trainable=True)


def held_out_loss(model: torch.nn.Module, held_out: Tensor) -> float:
    """Return the mean loss over windows that are not trained on."""
    model.eval()
    with torch.inference_mode():
        losses = [model(input_ids=window[None], labels=window[None]).loss.item() for window in held_out]
    model.train()
    return sum(losses) / len(losses)


def learning_rates(words: list[str], methods: list[str]) -> dict[str, float]:
    """Read `--lr`: a number for all, NAME=NUMBER for one method, or for all ranks of it."""
    rates = dict.fromkeys(methods, 1e-3)
    for word in sorted(words, key=lambda word: len(word.partition("=")[0]) * ("=" in word)):
        name, _, number = word.rpartition("=")
        rates |= {m: float(number) for m in methods if name in ("", m, m.partition("-")[0])}
    return rates


def train(model: PeftModel, batches: Tensor, held_out: Tensor, *, lr: float, every: int, name: str) -> dict[str, Any]:
    """Train the adapter with AdamW, warm-up and cosine, and return the losses."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(0.03 * len(batches)), len(batches))
    losses, measured, norms = [], [], []
    started = time.monotonic()
    for step, batch in enumerate(batches):
        if step % every == 0:
            measured.append([step, held_out_loss(model, held_out)])
            print(
                f"{name:5} step {step:4} held-out {measured[-1][1]:.4f} {time.monotonic() - started:.0f} s", flush=True
            )
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 1.0)))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    measured.append([len(batches), held_out_loss(model, held_out)])
    print(f"{name:5} step {len(batches):4} held-out {measured[-1][1]:.4f}", flush=True)
    return {
        "parameters": sum(p.numel() for p in parameters),
        "seconds": round(time.monotonic() - started, 1),
        "held_out": [[step, round(loss, 5)] for step, loss in measured],
        "training": [round(loss, 5) for loss in losses],
        "gradient_norms": [round(norm, 5) for norm in norms],
    }


def smoothed(losses: list[float], decay: float = 0.95) -> list[float]:
    """Return the exponential moving average, without bias towards its start."""
    result, total, weight = [], 0.0, 0.0
    for loss in losses:
        total, weight = decay * total + loss, decay * weight + 1
        result.append(total / weight)
    return result


def draw(curves: dict[str, dict[str, Any]], picture: Path) -> None:
    """Draw smoothed training losses and held-out losses against steps."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "basis"  # the same figures give the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for method, curve in curves.items():
        look = {"color": COLOURS.get(method), "label": method}
        axes[0].plot(smoothed(curve["training"]), **look)
        axes[1].plot(*zip(*curve["held_out"], strict=True), marker="o", markersize=3, **look)
    for axis, label in zip(axes, ("training loss, smoothed", "held-out loss"), strict=True):
        axis.set_xlabel("step")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(picture, metadata={"Date": None})
    pyplot.close(figure)


def steps_to(curve: dict[str, Any], target: float) -> float | None:
    """Return the step at which the held-out loss passes a target, between two measurements by a straight line."""
    for (before, high), (after, low) in pairwise(curve["held_out"]):
        if low <= target:
            return before + (after - before) * (high - target) / (high - low)
    return None


def show(curves: dict[str, dict[str, Any]]) -> None:
    """Print a Markdown table."""
    print(
        "| method | parameters | bytes | learning rate | held-out loss | perplexity | step that reaches LoRA's last |\n"
        "|---|---|---|---|---|---|---|"
    )
    target = curves["lora"]["held_out"][-1][1] if "lora" in curves else None
    for method, curve in curves.items():
        reached = None if target is None else steps_to(curve, target)
        print(
            f"| {method} | {curve['parameters']:,} | {curve['bytes']:,} | {curve['lr']:g} | "
            f"{curve['held_out'][-1][1]:.4f} | {math.exp(curve['held_out'][-1][1]):.3f} | "
            f"{'–' if reached is None else round(reached)} |"
        )


def main() -> None:
    """Train what is missing, then draw and print everything that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="path or Hub id of SmolLM2-135M-Instruct, or of another causal LM")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for curves, picture and starts")
    parser.add_argument("--methods", nargs="+", default=["lora", "pissa", "eva"], help="lora, and what `init` knows")
    parser.add_argument("--domain", choices=DOMAINS, default="kjv")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--lr", nargs="+", default=["1e-3", "pissa=3e-4", "nola=1e-2"], help="for all; NAME=… for one method"
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--every", type=int, default=50, help="steps between held-out measurements")
    parser.add_argument("--windows", type=int, default=24, help="held-out windows")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for method in args.methods:
        if not METHOD.fullmatch(method):
            raise SystemExit(f"{method}: a method is NAME, NAME-rRANK or NAME-rRANK-kBASES")

    args.output.mkdir(parents=True, exist_ok=True)
    rates = learning_rates(args.lr, args.methods)
    settings = {name: value for name, value in vars(args).items() if name not in {"model", "output", "methods", "lr"}}
    curves = {file.stem: json.loads(file.read_text()) for file in sorted(args.output.glob("*.json"))}
    for name, curve in curves.items():
        if curve["settings"] != settings or (name in args.methods and curve["lr"] != rates[name]):
            raise SystemExit(f"{args.output / name}.json was made with other settings: choose another folder")
    missing = [method for method in args.methods if method not in curves]
    if missing:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        batches = training_batches(tokenizer, args)
        held_out = windows(tokenizer, held_out_text(args.domain), args.length)[: args.windows]
    for method in missing:
        torch.manual_seed(args.seed)
        model = adapted(method, args, batches)
        curve = train(model, batches, held_out, lr=rates[method], every=args.every, name=method)
        saved = args.output / "adapters" / method
        model.save_pretrained(saved, save_embedding_layers=False)
        size = (saved / "adapter_model.safetensors").stat().st_size
        curves[method] = {"settings": settings, "lr": rates[method], "bytes": size, **curve}
        (args.output / f"{method}.json").write_text(json.dumps(curves[method]) + "\n")
    curves = {method: curves[method] for method in [*COLOURS, *sorted(curves.keys() - COLOURS)] if method in curves}
    draw(curves, args.output / "curves.svg")
    show(curves)


if __name__ == "__main__":
    main()
