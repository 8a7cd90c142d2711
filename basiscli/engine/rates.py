"""How fast one worker of a measured machine is: what `--dry-run` turns bytes and operations into hours with.

From `benchmarks/scale.py` and `benchmarks/scale.py --methods`, whose results are `benchmarks/results/scale.json`:
processor time of a worker on one core, the start of the command not counted. The rates of running a model are
from whole commands on SmolLM2, as docs/scale.md has them. Storage slower than that sets the pace itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """What one worker does in a second."""

    machine: str
    copy_bytes: float
    """Read, checked, hashed and written: of both together."""
    methods: Mapping[str, float]
    """The same with what a merge method does to every number; ortho's decompositions are counted beside."""
    exact_flops: float
    """Of Gram matrices and eigenvectors in float64."""
    fast_flops: float
    """Of the block Krylov iteration in float32, with what the report measures of its result."""
    forward_flops: float
    """Of running a model over text, and adding up the moments of its inputs: products in float32, mostly."""
    training_flops: float
    """Of forwards and backwards of a whole model with its logits, and their distance from the dense model's."""

    def merge_bytes(self, method: str) -> float:
        """Return the rate of a merge method; of one that was not measured, the slowest's."""
        return self.methods.get(method, min(self.methods.values()))


MEASURED = Rates(
    machine="an AMD EPYC core",
    copy_bytes=0.73e9,
    methods={
        "arcee_fusion": 0.19e9,
        "breadcrumbs": 0.58e9,
        "breadcrumbs_ties": 0.42e9,
        "dare_linear": 0.31e9,
        "dare_ties": 0.32e9,
        "della": 0.49e9,
        "della_linear": 0.54e9,
        "karcher": 0.51e9,
        "linear": 0.73e9,
        "model_stock": 0.46e9,
        "multislerp": 0.44e9,
        "nearswap": 0.59e9,
        "nuslerp": 0.65e9,
        "ortho": 0.73e9,
        "passthrough": 0.69e9,
        "sce": 0.49e9,
        "slerp": 0.58e9,
        "task_arithmetic": 0.47e9,
        "ties": 0.56e9,
    },
    exact_flops=46e9,
    fast_flops=9.4e9,
    forward_flops=58e9,
    training_flops=50e9,
)
