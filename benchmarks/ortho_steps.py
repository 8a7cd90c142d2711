"""`ortho`'s projection against the paper's steps with full SVDs: `python benchmarks/ortho_steps.py`.

The matrices of SmolLM2-135M's layers (576 wide), three models. The reference decomposes with full m×m and n×n factors
and multiplies them out, as published; torch gives it all processors. Ours runs as the engine runs it:
single-threaded tasks side by side. Both see the same matrices in one run; the least time of each counts.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from basiscli.linalg.lowrank import LowRank
from basiscli.linalg.projection import project_and_add

SHAPES = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
ALPHA = 0.5


def step_by_step(task_vectors: list[Tensor]) -> Tensor:
    merged = task_vectors[0]
    for task_vector in task_vectors[1:]:
        u, sigma, vh = torch.linalg.svd(merged, full_matrices=True)
        r = int((sigma.cumsum(0) / sigma.sum() > ALPHA).int().argmax())
        projected = u.mT @ task_vector @ vh.mT
        projected.diagonal().fill_(0)
        projected[:r, :r] = 0
        merged = merged + u @ projected @ vh
    return merged


def ours(task_vectors: list[Tensor] | list[LowRank]) -> Tensor | LowRank:
    merged: Tensor | LowRank = task_vectors[0]
    for task_vector in task_vectors[1:]:
        merged, _ = project_and_add(merged, task_vector, ALPHA)
    return merged


def least_time(work: Callable[[], object], runs: int) -> float:
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    torch.manual_seed(0)
    shapes = SHAPES * args.layers
    dense = [[torch.randn(shape) for _ in range(args.models)] for shape in shapes]
    factors = [[LowRank(torch.randn(m, 8), torch.randn(8, n), (m, n)) for _ in range(args.models)] for m, n in shapes]
    processors = os.cpu_count() or 1
    doubles = [[t.double() for t in group] for group in dense]
    singles = [[f.dense() for f in group] for group in factors]

    def in_workers(groups: list[list[Tensor]] | list[list[LowRank]]) -> Callable[[], object]:
        def work() -> object:
            torch.set_num_threads(1)
            with ThreadPoolExecutor(processors, initializer=lambda: torch.set_num_threads(1)) as pool:
                results = list(pool.map(ours, groups))
            torch.set_num_threads(processors)
            return results

        return work

    times = {
        "step by step, float32": least_time(lambda: [step_by_step(g) for g in dense], args.runs),
        "step by step, float64": least_time(lambda: [step_by_step(g) for g in doubles], args.runs),
        "ours, dense": least_time(in_workers(dense), args.runs),
        "step by step, LoRA inputs (dense, float32)": least_time(lambda: [step_by_step(g) for g in singles], args.runs),
        "ours, LoRA inputs (rank 8)": least_time(in_workers(factors), args.runs),
    }
    exact = [step_by_step(g) for g in doubles]
    worst = {
        name: max(float((r.double() - e).norm() / e.norm()) for r, e in zip(results, exact, strict=True))
        for name, results in {
            "step by step, float32": [step_by_step(g) for g in dense],
            "ours, dense": [ours(g) for g in dense],
        }.items()
    }
    print(f"{len(shapes)} matrices, {args.models} models, {processors} processors, best of {args.runs}\n")
    print("| | seconds | largest error to float64 |\n|---|---|---|")
    for name, seconds in times.items():
        print(f"| {name} | {seconds:.3f} | {f'{worst[name]:.1e}' if name in worst else ''} |")
    ratio = {
        "dense, against float32": times["step by step, float32"] / times["ours, dense"],
        "dense, against float64": times["step by step, float64"] / times["ours, dense"],
        "LoRA, against float32": times["step by step, LoRA inputs (dense, float32)"]
        / times["ours, LoRA inputs (rank 8)"],
    }
    print()
    for name, value in ratio.items():
        print(f"{name}: {value:.1f} times faster")
    if args.json:
        args.json.write_text(json.dumps({"seconds": times, "errors": worst, "ratios": ratio}, indent=1) + "\n")


if __name__ == "__main__":
    main()
