"""Measured throughput of one worker, by which `--dry-run` turns bytes and operations into hours.

From `benchmarks/scale.py` and `benchmarks/scale.py --methods`, whose results are `benchmarks/results/scale.json`:
processor time of a worker on one core, the start of the command not counted. The rates of running a model are
from whole commands on SmolLM2, as docs/scale.md has them. Storage slower than that sets the pace itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """Throughput of one worker: bytes or floating-point operations a second."""

    machine: str
    copy_bytes: float
    """Reading, checking, hashing and writing a tensor: bytes read and written together."""
    methods: Mapping[str, float]
    """The same with a merge method's arithmetic, by method; the decompositions of `ortho` are counted apart."""
    exact_flops: float
    """Gram matrices and eigenvectors in float64 (`exact_svd`)."""
    fast_flops: float
    """Block Krylov iteration in float32 (`fast_svd`), with what the report measures of its result."""
    forward_flops: float
    """A forward over text, and adding up the moments of inputs: products in float32, mostly."""
    training_flops: float
    """Forward and backward of a whole model with its logits and the distillation loss."""

    def merge_bytes(self, method: str) -> float:
        """Return bytes a second of a merge method; for one that was not measured those of the slowest."""
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
