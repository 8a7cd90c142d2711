"""Fine-tune SmolLM2-135M-Instruct with LoRA on one domain: `python train.py kjv --base PATH`.

About 15 minutes a domain on two CPU cores. Made with the defaults, the three adapters are the ones in `adapters/`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from domains import DOMAINS, HERE, training_text
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def main() -> None:
    """Train one adapter and save it in bfloat16."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("domain", choices=DOMAINS)
    parser.add_argument("--base", default=BASE, help="path or Hub id of SmolLM2-135M-Instruct")
    parser.add_argument("--out", type=Path, default=HERE / "adapters")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    args = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    model = get_peft_model(
        model,
        LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.steps // 10, args.steps)

    # A prefix of the text holds far more tokens than the steps below use.
    needed = args.steps * args.batch * args.length
    ids = tokenizer(training_text(args.domain)[: 12 * needed], return_tensors="pt")["input_ids"][0]
    windows = ids[: len(ids) // args.length * args.length].view(-1, args.length)
    order = torch.randperm(len(windows))

    model.train()
    started = time.monotonic()
    for step in range(args.steps):
        picks = order[torch.arange(step * args.batch, (step + 1) * args.batch) % len(order)]
        batch = windows[picks]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == args.steps - 1:
            print(
                f"{args.domain} step {step} loss {loss.item():.3f} {time.monotonic() - started:.0f} s",
                flush=True,
            )

    model.to(torch.bfloat16)
    model.peft_config["default"].base_model_name_or_path = BASE
    model.save_pretrained(args.out / args.domain, save_embedding_layers=False)


if __name__ == "__main__":
    main()
