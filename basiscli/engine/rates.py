"""How fast one worker of a measured machine is: what `--dry-run` turns bytes and operations into hours with.

From `benchmarks/scale.py` and `benchmarks/scale.py --methods`, whose results are `benchmarks/results/scale.json`:
processor time of a worker on one core, the start of the command not counted. Storage slower than that sets the pace
itself.
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
    """Of the block Krylov iteration in float32."""
    forward_flops: float
    """Of matrix products in float32."""

    def merge_bytes(self, method: str) -> float:
        """Return the rate of a merge method; of one that was not measured, the slowest's."""
        return self.methods.get(method, min(self.methods.values()))


MEASURED = Rates(
    machine="an AMD EPYC core",
    copy_bytes=0.58e9,
    methods={
        "arcee_fusion": 0.2e9,
        "breadcrumbs": 0.45e9,
        "breadcrumbs_ties": 0.35e9,
        "dare_linear": 0.32e9,
        "dare_ties": 0.37e9,
        "della": 0.4e9,
        "della_linear": 0.45e9,
        "karcher": 0.46e9,
        "linear": 0.58e9,
        "model_stock": 0.4e9,
        "multislerp": 0.47e9,
        "nearswap": 0.38e9,
        "nuslerp": 0.37e9,
        "ortho": 0.58e9,
        "passthrough": 0.44e9,
        "sce": 0.32e9,
        "slerp": 0.38e9,
        "task_arithmetic": 0.38e9,
        "ties": 0.28e9,
    },
    exact_flops=45e9,
    fast_flops=11e9,
    forward_flops=92e9,
)
