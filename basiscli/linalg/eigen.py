"""Eigenvectors of symmetric matrices: those that several threads want at the same time, as one batch.

A GPU is several times faster with a dozen matrices of a few hundred rows at once than with one after another (torch
from 2.12 on, whose `eigh` is cuSOLVER's batched one). Threads that go in step wait for each other where they want
eigenvectors, so that what a task does with a matrix is written as if there were no other.

Batched decompositions of GPUs have been wrong without saying so (pytorch issues 94772, 105359 and 192483; cupy issue
4847). What a GPU returns is therefore tried on a few vectors, and where it does not hold the CPU's is taken.
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
    """What a thread that goes in step with others decomposes with."""

    eigh: Callable[[Tensor], Decomposition] | None = None


_here = _Here()


def eigh(matrix: Tensor) -> Decomposition:
    """Decompose a symmetric matrix [..., n, n], of which the lower triangle is read.

    Returns:
        Eigenvalues [..., n], the smallest first, and eigenvectors [..., n, n], one a column.
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


class GivenUp(Exception):
    """Another thread of the same step failed."""


class Step:
    """Threads that go in step: each wait at `eigh` ends when all that still run have come to one.

    The matrices of equal shape and dtype that were brought there are one batch, in the order of the threads' numbers.
    So which go together depends on what the threads do and never on how fast they are.
    """

    def __init__(self, members: int) -> None:
        self._running = set(range(members))
        self._wanted: dict[int, Tensor] = {}
        self._found: dict[int, Decomposition] = {}
        self._given_up = False
        self._changed = threading.Condition()

    @contextmanager
    def member(self, number: int) -> Iterator[None]:
        """Have this thread be one of them; an error ends the others where they wait next, by `GivenUp`."""
        _here.eigh = lambda matrix: self._eigh(number, matrix)
        try:
            yield
        except BaseException:
            self.give_up()
            raise
        finally:
            _here.eigh = None
            with self._changed:
                self._running.discard(number)
                self._go_on()

    def give_up(self) -> None:
        """End all threads where they wait, or wait next."""
        with self._changed:
            self._given_up = True
            self._changed.notify_all()

    def _eigh(self, number: int, matrix: Tensor) -> Decomposition:
        with self._changed:
            self._wanted[number] = matrix
            self._go_on()
            self._changed.wait_for(lambda: self._given_up or number in self._found)
            if number not in self._found:
                raise GivenUp
            return self._found.pop(number)

    def _go_on(self) -> None:
        """Decompose what is wanted if nobody is missing."""
        if self._given_up or not self._wanted or self._wanted.keys() != self._running:
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
            self._given_up = True
            raise
        finally:
            self._changed.notify_all()
