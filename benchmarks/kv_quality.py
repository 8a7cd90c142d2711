"""What a smaller KV cache costs: `python benchmarks/kv_quality.py MODEL TEXT NAME=FOLDER…`.

MODEL is the dense model, TEXT a folder with `train.jsonl` and `held-out.jsonl` (kv_text.py makes it), each FOLDER an
output of `basis compress MODEL …` whose bases are measured under NAME. For every set of bases, ranks are found at all
ratios by `uniform` and by `greedy`, and the model is scored on held-out text. Writes results/kv_quality.json and draws
docs/images/kv_quality.svg.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from kv_picture import draw

from basiscli.calibration.tokens import Windows, read_windows
from basiscli.checkpoints.kv_file import read_kv_bases
from basiscli.commands.kv.attention import Projector, set_bases
from basiscli.commands.kv.search import GreedySearch, spectrum, uniform
from basiscli.progress import Silent
from basiscli.registry import Registry
from basiscli.runtime.kv_projection import attach, attention_modules
from basiscli.runtime.load import load_tokenizer, load_weights

RATIOS = (0.125, 0.25, 0.375, 0.5, 0.6, 0.75)
WINDOWS, LENGTH = 16, 512
RESULTS = Path(__file__).parent / "results" / "kv_quality.json"


def scores(model: Any, windows: Windows, dense: list[torch.Tensor]) -> dict[str, float]:
    """Return perplexity, accuracy, and KL and agreement with the dense log-probabilities (which an empty list gets)."""
    keep, sums, first = not dense, torch.zeros(4, dtype=torch.float64), []
    for place in range(len(windows)):
        one = windows.select([place])
        log = model(**one.inputs, use_cache=False).logits[0, :-1].log_softmax(-1)
        labels = one.labels[0, :-1]
        if keep:
            dense.append(log)
        reference = dense[place]
        sums[0] -= log.gather(-1, labels[:, None]).sum()
        sums[1] += (log.argmax(-1) == labels).sum()
        sums[2] += (reference.exp() * (reference - log)).sum()
        sums[3] += (reference.argmax(-1) == log.argmax(-1)).sum()
        first.append(len(labels))
    nll, hits, kl, agree = (sums / sum(first)).tolist()
    return {"perplexity": math.exp(nll), "accuracy": hits, "kl": kl, "agreement": agree}


@torch.no_grad()
def main() -> None:
    """Measure and write."""
    place, text = Path(sys.argv[1]), Path(sys.argv[2])
    folders = dict(word.split("=", 1) for word in sys.argv[3:])
    model = load_weights(place, torch.float32, torch.device("cpu"))

    def windows(name: str, count: int, length: int) -> Windows:
        found = read_windows(text / f"{name}.jsonl", lambda: load_tokenizer(place), length, model.config.vocab_size)
        return found.select(torch.arange(count) * len(found) // count)

    held, train = windows("held-out", WINDOWS, LENGTH), windows("train", 408, 256)
    decides = torch.arange(len(train)) % 51 == 0  # windows that choose between the search's rounds
    projectors = [Projector() for _ in attention_modules(model)]
    attach(model, projectors)
    dense: list[torch.Tensor] = []
    table = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"rows": []}
    table["dense"] = scores(model, held, dense)
    table |= {"model": "SmolLM2-135M-Instruct, float32", "held_out_tokens": held.tokens, "torch": torch.__version__}
    for name, folder in folders.items():
        found = read_kv_bases(Path(folder))
        config, bases = found.config, found.bases
        table["rows"] = [row for row in table["rows"] if row["bases"] != name]
        shape, levels = tuple(bases.shape[:3]), config.levels
        count = math.prod(shape) * levels
        budgets = [math.floor((1 - ratio) * count + 1e-9) for ratio in RATIOS]
        method = Registry().find("compress", config.method)
        transform = method.implementation(method.validate(config.parameters))
        seconds, rounds, greedy = 0.0, 0, []
        for budget in budgets:
            search = GreedySearch(
                model, projectors, transform, bases, train.select(~decides), train.select(decides), levels
            )
            starts = [uniform(shape, levels, budget), spectrum(found.energy, levels, budget)]
            greedy.append(search.run(starts, Silent()).levels)
            seconds, rounds = seconds + search.round_seconds, rounds + search.rounds
        for ratio, budget, searched in zip(RATIOS, budgets, greedy, strict=True):
            for how, ranks in (("uniform", uniform(shape, levels, budget)), ("greedy", searched)):
                set_bases(projectors, bases, ranks * (bases.shape[-1] // levels))
                row = {
                    "bases": name,
                    "search": how,
                    "removed": ratio,
                    "kept": float(ranks.sum()) / count,
                    "key_dims": float(ranks[:, 0].float().mean()) * bases.shape[-1] / levels,
                    "value_dims": float(ranks[:, 1].float().mean()) * bases.shape[-1] / levels,
                    **scores(model, held, dense),
                }
                table["rows"].append(row)
                print(json.dumps(row), flush=True)
        set_bases(projectors, None)
        table.setdefault("searches", {})[name] = {
            "rounds": rounds,
            "seconds": seconds,
            "seconds_a_round": seconds / rounds,
            "trained_steps": config.trained_steps,
            "trained_tokens": config.trained_tokens,
        }
        RESULTS.write_text(json.dumps(table, indent=1) + "\n")
    draw(table)


if __name__ == "__main__":
    main()
