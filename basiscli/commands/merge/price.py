"""The cost estimate of a merge, from the headers of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from basiscli.checkpoints.adapter_view import AdapterView, Model
from basiscli.checkpoints.views import Checkpoint
from basiscli.engine.pricing import Price, bytes_to_download, flops_per_worker, projection_flops
from basiscli.engine.rates import Rates
from basiscli.engine.settings import Settings
from basiscli.model.architecture import kind_by_name
from basiscli.transforms import Kind, Method


class _Plan(Protocol):
    """The fields of a `MergePlan` that a price needs; `plan.py` imports this file, and not the other way round."""

    @property
    def method(self) -> Method: ...
    @property
    def models(self) -> Sequence[Model]: ...
    @property
    def base(self) -> Checkpoint | None: ...
    @property
    def reference(self) -> Checkpoint: ...
    @property
    def merged(self) -> Sequence[str]: ...
    @property
    def copied(self) -> Sequence[str]: ...
    @property
    def two_passes(self) -> bool: ...
    @property
    def read_bytes(self) -> int: ...
    @property
    def write_bytes(self) -> int: ...
    @property
    def scratch_bytes(self) -> int: ...
    @property
    def settings(self) -> Settings: ...


def merge_price(plan: _Plan, workspace: Callable[[str], int], rates: Rates) -> Price:
    """Return the estimated cost of a merge: bytes, floating-point operations and seconds.

    Args:
        plan: of the merge.
        workspace: returns the bytes of memory that merging a tensor takes, by its name.
        rates: measured throughput of one worker.
    """
    count = len(plan.models)
    elements = sum(plan.reference.tensors[name].count for name in (*plan.merged, *plan.copied))
    flops = 2.0 * count * elements
    if plan.base is not None:
        flops += 2.0 * (count + 1) ** 2 * elements
    # Reading, converting, hashing and writing cost the same a byte whatever the method adds.
    streamed = plan.read_bytes + plan.write_bytes + 2 * plan.scratch_bytes
    seconds = streamed / rates.merge_bytes(plan.method.name) / plan.settings.workers
    work = _decompositions(plan, workspace)
    settings = plan.settings
    seconds += flops_per_worker(work, settings.workers, settings.shared_memory) / rates.exact_flops
    return Price(
        read_bytes=plan.read_bytes,
        write_bytes=plan.write_bytes,
        flops=flops + sum(own for own, _ in work),
        seconds=seconds,
        workers=settings.workers,
        machine=rates.machine,
        download_bytes=bytes_to_download(
            [plan.reference, *(m.adapter.weights if isinstance(m, AdapterView) else m for m in plan.models)]
        ),
    )


def _decompositions(plan: _Plan, workspace: Callable[[str], int]) -> list[tuple[float, int]]:
    """Return the operations and the bytes of memory of each matrix that is decomposed; of adapters it costs nothing."""
    if not plan.two_passes or any(isinstance(model, AdapterView) for model in plan.models):
        return []
    steps = len(plan.models) - 1  # the first model is taken as it is
    matrices = [plan.reference.tensors[name] for name in plan.merged]
    return [
        (steps * projection_flops(matrix.shape), workspace(matrix.name))
        for matrix in matrices
        if kind_by_name(matrix) is Kind.LINEAR and len(matrix.shape) == 2
    ]
