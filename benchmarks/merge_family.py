"""The merge family against mergekit: `python benchmarks/merge_family.py MERGEKIT_PYTHON --json FIGURES.json`.

Every method merges SmolLM2-135M (the base) and two copies with moved weights, all float32, with both tools, each in its
own environment and as its user starts it. Printed and written: wall time and peak memory of each, and how far the two
results are apart. Elements that one tool selected and the other did not (equal magnitudes at a threshold, a threshold
that mergekit samples) are counted apart; results of random masks are compared by their statistics.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import CACHE, Cost, best, fine_tunes, measured

OURS, THEIRS = CACHE / "family-basis", CACHE / "family-mergekit"
RANDOM = {"dare_linear", "dare_ties", "della", "della_linear"}
REASONS = {
    "ties": "equal magnitudes at the threshold: which of them stay is free",
    "breadcrumbs": "equal magnitudes at the threshold: which of them stay is free",
    "breadcrumbs_ties": "equal magnitudes at the threshold: which of them stay is free",
    "sce": "variances that agree to float32's rounding at the threshold",
    "arcee_fusion": "mergekit samples the quartiles of tensors with over a million elements; divergences near rounding",
}
# Where mergekit's own arithmetic is further from float64 than 1e-5.
PRECISION = {
    "multislerp": "mergekit sums the embedding's 28 million products in float32: 6.6e-5 off float64, basis 3e-8",
}


@dataclass(frozen=True)
class Case:
    """A method as both tools are asked for it."""

    parameters: dict[str, Any] = field(default_factory=dict)
    """For the whole merge."""
    density: list[float] | None = None
    """One a model."""
    weights: list[float] | None = None
    base: bool = True
    """Whether SmolLM2 itself is the base; else it is not part of the merge, or the first model is mergekit's base."""
    first_is_base: bool = False
    models: int = 2


CASES = {
    "ties": Case(density=[0.3, 0.5], weights=[1.0, 0.5]),
    "breadcrumbs": Case({"gamma": 0.05}, density=[0.3, 0.5], weights=[1.0, 0.5]),
    "breadcrumbs_ties": Case({"gamma": 0.05}, density=[0.3, 0.5], weights=[1.0, 0.5]),
    "dare_linear": Case(density=[0.5, 0.5], weights=[1.0, 0.5]),
    "dare_ties": Case(density=[0.5, 0.5], weights=[1.0, 0.5]),
    "della": Case({"epsilon": 0.15}, density=[0.5, 0.5], weights=[1.0, 0.5]),
    "della_linear": Case({"epsilon": 0.15}, density=[0.5, 0.5], weights=[1.0, 0.5]),
    "sce": Case({"select_topk": 0.5}),
    "slerp": Case({"t": 0.3}, base=False, first_is_base=True),
    "nuslerp": Case(weights=[1.0, 0.5]),
    "multislerp": Case(weights=[1.0, 0.5]),
    "karcher": Case(base=False),
    "model_stock": Case(),
    "nearswap": Case({"t": 0.0005}, base=False, first_is_base=True),
    "passthrough": Case({"scale": 0.5}, base=False, models=1),
    "arcee_fusion": Case(base=False, first_is_base=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mergekit", type=Path, help="the Python of an environment with mergekit 0.1.5")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=list(CASES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    for limit in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # of the caller's; each tool runs as it comes
        os.environ.pop(limit, None)

    base, *models = fine_tunes("float32", 3)
    # Methods measured before stay: `--only` adds to a file.
    found = json.loads(args.json.read_text()) if args.json and args.json.is_file() else {}
    columns = [
        "method",
        "basis",
        "mergekit",
        "wall ratio",
        "peak memory",
        "its ratio",
        "difference",
        "selected otherwise",
    ]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for method in args.only:
        found[method] = record = measure(method, CASES[method], base, models, args.mergekit, args.runs)
        ours, theirs = record["basis"], record["mergekit"]
        difference = record["difference"]
        apart = difference.get("relative")
        print(
            f"| {method} | {ours['seconds']:.1f} s | {theirs['seconds']:.1f} s "
            f"| {ours['seconds'] / theirs['seconds']:.2f} "
            f"| {ours['peak_bytes'] / 1e9:.2f} of {theirs['peak_bytes'] / 1e9:.2f} GB "
            f"| {ours['peak_bytes'] / theirs['peak_bytes']:.2f} "
            + (f"| {apart:.1e} | {difference['flipped']:.1e} |" if apart is not None else f"| {difference} | |"),
            flush=True,
        )
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n")


def measure(method: str, case: Case, base: Path, models: list[Path], python: Path, runs: int) -> dict[str, Any]:
    """Run both tools and compare what they wrote."""
    models = models[: case.models]
    recipe = CACHE / f"family-{method}.yaml"
    recipe.write_text(json.dumps(recipe_of(method, case, base, models)))  # JSON is YAML
    commands: dict[str, list[str | Path]] = {
        "basis": [Path(sys.executable).with_name("basis"), "merge", *models, "-m", method, "-q", "-o", OURS],
        "mergekit": [python.with_name("mergekit-yaml"), recipe, THEIRS, "--quiet"],
    }
    commands["basis"] += ["--base", base] if case.base else []
    commands["basis"] += ["--weights", ",".join(map(str, case.weights))] if case.weights else []
    parameters = case.parameters | ({"density": case.density} if case.density else {})
    for name, value in parameters.items():
        commands["basis"] += ["-p", f"{name}={json.dumps(value)}"]
    costs: dict[str, list[Cost]] = {tool: [] for tool in commands}
    for _ in range(runs):
        for tool, command in commands.items():
            shutil.rmtree(OURS if tool == "basis" else THEIRS, ignore_errors=True)
            costs[tool].append(measured(command, {"HF_HUB_OFFLINE": "1"}))
    # In a process of its own: a child's peak memory starts from what its parent holds.
    compared = subprocess.run(
        [sys.executable, __file__, "--compare", method, str(base)], check=True, capture_output=True, text=True
    )
    record: dict[str, Any] = {tool: best(found)._asdict() for tool, found in costs.items()}
    return record | {"parameters": parameters, "weights": case.weights, "difference": json.loads(compared.stdout)}


def recipe_of(method: str, case: Case, base: Path, models: list[Path]) -> dict[str, Any]:
    """Return mergekit's recipe of the same merge."""
    own = [
        {"weight": (case.weights or [1.0] * len(models))[place]}
        | ({"density": case.density[place]} if case.density else {})
        if case.density or case.weights
        else {}
        for place in range(len(models))
    ]
    recipe: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(model), "parameters": p} for model, p in zip(models, own, strict=True)],
        "parameters": case.parameters,
        "dtype": "float32",
    }
    if case.base or case.first_is_base:
        recipe["base_model"] = str(base if case.base else models[0])
    return recipe


def compare(method: str, base: Path) -> dict[str, Any]:
    """Return how far the two results are apart, over all tensors."""
    from safetensors import safe_open

    files = [safe_open(folder / "model.safetensors", "pt") for folder in (OURS, THEIRS, base)]
    names = set(files[0].keys())
    if names != set(files[1].keys()):
        raise SystemExit(f"{method}: different tensors: {sorted(names ^ set(files[1].keys()))[:5]}")
    relative, flipped, count = 0.0, 0, 0
    changed, length = [0, 0], [0.0, 0.0]
    for name in sorted(names):
        ours, theirs, start = (file.get_tensor(name).double() for file in files)
        count += ours.numel()
        for place, result in enumerate((ours, theirs)):
            changed[place] += int((result != start).sum())
            length[place] += float((result - start).abs().sum())
        if method in RANDOM:
            continue
        apart = (ours - theirs).abs()
        same = apart <= 1e-5 * theirs.abs().max()
        if method in REASONS:
            flipped += int((~same).sum())
            apart *= same
        relative = max(relative, float(apart.norm() / theirs.norm()))
    if method in RANDOM:
        return {
            "reason": "random masks",
            "share of elements changed": [c / count for c in changed],
            "sum of changes, ours over theirs": length[0] / length[1],
        }
    found: dict[str, Any] = {"relative": relative, "flipped": flipped / count}
    reason = REASONS.get(method) if flipped else PRECISION.get(method)
    return found | ({"reason": reason} if reason else {})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compare"]:
        print(json.dumps(compare(sys.argv[2], Path(sys.argv[3]))))
    else:
        main()
