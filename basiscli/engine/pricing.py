"""Cost estimates for `--dry-run`: bytes, floating-point operations, and hours at the rates of `engine.rates`.

Each command counts its own work in its `price.py`, with the functions here. Operations are counted from shapes,
multiplications and additions alike, as the algorithms of `linalg` do them: n × n eigenvectors as 9 n³, the product of
m × k and k × n as 2 m n k. What an elementwise method does to each number is in its measured rate; of its operations
only the weighted sum and the statistics of the report are counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from basiscli.checkpoints.views import Checkpoint
from basiscli.names import format_count, format_size

_EIGEN = 9  # operations of a symmetric eigendecomposition with vectors, in n³
_KRYLOV_BLOCKS = 8  # of rank + 8 columns each: what `fast_svd` needs on weights of language models, about


@dataclass(frozen=True)
class Price:
    """Estimated cost of a run in bytes, operations and seconds, from the shapes of its tensors and measured rates."""

    read_bytes: int
    write_bytes: int
    flops: float
    """Floating-point operations of all workers together."""
    seconds: float
    """Wall-clock time with `workers` in parallel, and storage that keeps up."""
    workers: int
    machine: str
    """The hardware of one worker that was measured: `an AMD EPYC core`."""
    download_bytes: int = 0
    """Bytes of weights on the Hub that are not in the local cache."""

    @property
    def hours(self) -> float:
        """The time in hours."""
        return self.seconds / 3600

    @property
    def time(self) -> str:
        """The time as a person reads it: `40 s`, `12 minutes` or `3.5 hours`."""
        if self.seconds < 90:
            return f"{max(1, round(self.seconds))} s"
        return f"{self.seconds / 60:.0f} minutes" if self.seconds < 5400 else f"{self.seconds / 3600:.1f} hours"

    def sentence(self) -> str:
        """Return download, operations and time in words.

        `8.59 TFLOP: about 2.4 hours with 2 workers, each an AMD EPYC core, on storage of at least 1.5 GB/s`
        """
        rate = format_size((self.read_bytes + self.write_bytes) / max(self.seconds, 1e-9))
        fetched = f"download {format_size(self.download_bytes)}, then " if self.download_bytes else ""
        return (
            f"{fetched}{_operations(self.flops)}: about {self.time} with {format_count(self.workers, 'worker')}, "
            f"each {self.machine}, on storage of at least {rate}/s"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return all fields and `hours` as plain data, for `--json`."""
        return {**vars(self), "hours": self.hours}


def _operations(flops: float) -> str:
    for unit in ("", "k", "M", "G", "T", "P"):
        if flops < 1000:
            return f"{flops:.3g} {unit}FLOP"
        flops /= 1000
    return f"{flops:.4g} EFLOP"


def bytes_to_download(checkpoints: Iterable[Checkpoint | None]) -> int:
    """Return the bytes of those checkpoints that are on the Hub and not in the local cache, each counted once."""
    remote = {c.source.path: c for c in checkpoints if c is not None and c.source.is_remote}
    return sum(tensor.nbytes for checkpoint in remote.values() for tensor in checkpoint.tensors.values())


def flops_per_worker(work: Sequence[tuple[float, int]], workers: int, memory: int | None) -> float:
    """Return the floating-point operations of the busiest worker, by which a run's time is estimated.

    In one machine's memory large tasks do not fit side by side, however many workers there are; see `Threads`.

    Args:
        work: (operations, bytes of workspace) of each task.
        workers: how many tasks run at a time.
        memory: budget of all tasks together in bytes; None on a cluster, where each machine has its own.
    """
    even = sum(flops for flops, _ in work) / workers
    if memory is None or not work:
        return even
    budget = max([memory, *(held for _, held in work)])
    return max(even, sum(flops * held for flops, held in work) / budget)


def projection_flops(shape: Iterable[int]) -> float:
    """Return the operations of one `linalg.projection.project_and_add` of dense matrices of this shape.

    Two thirds of SᵀS, its eigenvectors V, U from them, T V, and U M Vᵀ.
    """
    n, m = sorted(shape)
    return (4 / 3 + 6) * m * n**2 + _EIGEN * n**3


def exact_svd_flops(shape: Iterable[int], rank: int) -> float:
    """Return the operations of `linalg.svd.exact_svd`: the smaller Gram matrix and all its eigenvectors."""
    n, m = sorted(shape)
    return 2.0 * m * n**2 + _EIGEN * n**3 + 2.0 * m * n * rank


def fast_svd_flops(shape: Iterable[int], rank: int) -> float:
    """Return the operations of `linalg.svd.fast_svd`: block Krylov iteration.

    Two products a block, and its basis made orthogonal twice; where the blocks would span the matrix, it is exact.
    """
    n, m = sorted(shape)
    columns = _KRYLOV_BLOCKS * (rank + min(rank, 8))
    if 2 * columns >= n:
        return exact_svd_flops((n, m), rank)
    return 4.0 * m * n * columns + 8.0 * n * columns**2 + _EIGEN * columns**3
