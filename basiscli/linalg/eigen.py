"""Eigendecompositions of symmetric matrices, those of several threads in one batch.

A GPU is several times faster with a dozen matrices of a few hundred rows at once than with one after another (torch
from 2.12 on, whose `eigh` is cuSOLVER's batched one). Threads in lockstep wait for each other at every call of `eigh`,
so that the code of a task is written as if its matrix were the only one.

Batched decompositions of GPUs have been wrong without saying so (pytorch issues 94772, 105359 and 192483; cupy issue
4847). A GPU's result is therefore checked on a few random vectors, and replaced by the CPU's where it is wrong.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Decomposition = tuple[Tensor, Tensor]
_CHECKED = frozenset({"cuda"})  # LAPACK's need no check
_PROBES = 4


class _Here(threading.local):
    """Replaces `eigh` in a thread that is in lockstep with others."""

    eigh: Callable[[Tensor], Decomposition] | None = None


_here = _Here()


def eigh(matrix: Tensor) -> Decomposition:
    """Return the eigendecomposition of symmetric matrices [..., n, n], of which the lower triangle is read.

    Inside `Lockstep.member` the matrices of all members are decomposed as one batch; otherwise as `torch.linalg.eigh`,
    with a check of a GPU's result.

    Returns:
        Eigenvalues [..., n], the smallest first, and eigenvectors [..., n, n], one per column.
    """
    return _decomposed(matrix) if _here.eigh is None else _here.eigh(matrix)


def _decomposed(matrix: Tensor) -> Decomposition:
    if matrix.device.type not in _CHECKED:
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors
    try:
        values, vectors = torch.linalg.eigh(matrix)
        if _holds(matrix, values, vectors):
            return values, vectors
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        pass
    values, vectors = torch.linalg.eigh(matrix.cpu())
    warnings.warn(
        f"the eigenvectors of {list(matrix.shape)} from {matrix.device} are wrong; the CPU's are taken", stacklevel=2
    )
    return values.to(matrix.device), vectors.to(matrix.device)


def _holds(matrix: Tensor, values: Tensor, vectors: Tensor) -> bool:
    """Return whether A V = V Λ and VᵀV = I for all matrices, as far as random vectors show: n² beside the work's n³."""
    if not values.numel():
        return True
    x = torch.randn(
        *values.shape, _PROBES, dtype=matrix.dtype, device=matrix.device,
        generator=torch.Generator(matrix.device).manual_seed(0),
    )  # fmt: skip
    scale = values.abs().amax(-1)[..., None].clamp_min(torch.finfo(values.dtype).tiny)
    turned, lower = vectors @ x, matrix.tril().div_(scale[..., None])
    product = lower @ turned + lower.mT @ turned - lower.diagonal(dim1=-2, dim2=-1)[..., None] * turned
    slack = 64 * max(values.shape[-1], 64) * torch.finfo(matrix.dtype).eps * x.norm(dim=(-2, -1))
    solved = (product - vectors @ ((values / scale)[..., None] * x)).norm(dim=(-2, -1)) <= slack
    orthogonal = (vectors.mT @ turned - x).norm(dim=(-2, -1)) <= slack
    return bool((solved & orthogonal).all())


class Aborted(Exception):
    """Raised in `eigh` when another thread of the same `Lockstep` failed."""


class Lockstep:
    """Threads whose calls of `eigh` wait for each other, until every thread that still runs has called it.

    Matrices of equal shape and dtype are then decomposed as one batch, in the order of the threads' indices. So which
    matrices are in a batch depends on what the threads do and never on how fast they are.

        lockstep = Lockstep(2)

        def work(index: int) -> None:  # runs in a thread of its own
            with lockstep.member(index):
                values, vectors = eigh(matrices[index])
    """

    def __init__(self, members: int) -> None:
        self._running = set(range(members))
        self._wanted: dict[int, Tensor] = {}
        self._found: dict[int, Decomposition] = {}
        self._aborted = False
        self._changed = threading.Condition()

    @contextmanager
    def member(self, index: int) -> Iterator[None]:
        """Make this thread the member of an index from 0; an error in it raises `Aborted` in the others' `eigh`."""
        _here.eigh = lambda matrix: self._eigh(index, matrix)
        try:
            yield
        except BaseException:
            self.abort()
            raise
        finally:
            _here.eigh = None
            with self._changed:
                self._running.discard(index)
                self._go_on()

    def abort(self) -> None:
        """Raise `Aborted` in all members, where they wait or at their next `eigh`."""
        with self._changed:
            self._aborted = True
            self._changed.notify_all()

    def _eigh(self, number: int, matrix: Tensor) -> Decomposition:
        with self._changed:
            self._wanted[number] = matrix
            self._go_on()
            self._changed.wait_for(lambda: self._aborted or number in self._found)
            if number not in self._found:
                raise Aborted
            return self._found.pop(number)

    def _go_on(self) -> None:
        """Decompose what is wanted if nobody is missing."""
        if self._aborted or not self._wanted or self._wanted.keys() != self._running:
            return
        alike: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
        for number in sorted(self._wanted):
            matrix = self._wanted[number]
            alike.setdefault((matrix.shape, matrix.dtype), []).append(number)
        try:
            for numbers in alike.values():
                values, vectors = _decomposed(torch.stack([self._wanted.pop(number) for number in numbers]))
                self._found |= {number: (values[at], vectors[at]) for at, number in enumerate(numbers)}
        except BaseException:  # this thread's to tell; the others wait for what will not come
            self._aborted = True
            raise
        finally:
            self._changed.notify_all()
