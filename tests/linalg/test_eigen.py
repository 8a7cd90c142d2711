"""Eigenvectors in batches: what goes together, and that nobody waits for ever."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from basiscli.linalg import eigen
from basiscli.linalg.eigen import GivenUp, Step, eigh
from basiscli.linalg.orthogonal import principal_axes
from basiscli.linalg.svd import exact_svd, fast_svd


def symmetric(seed: int, *shape: int) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made @ made.mT


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what is decomposed, as it comes."""
    seen: list[tuple[int, ...]] = []
    plain = torch.linalg.eigh

    def noting(matrix: Tensor) -> Any:
        seen.append(tuple(matrix.shape))
        return plain(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", noting)
    return seen


def in_step(*jobs: Callable[[], Any]) -> tuple[list[Any], list[BaseException | None]]:
    """Do jobs in threads of one step; return their results and errors."""
    step = Step(len(jobs))
    results: list[Any] = [None] * len(jobs)
    errors: list[BaseException | None] = [None] * len(jobs)

    def work(number: int) -> None:
        try:
            with step.member(number):
                results[number] = jobs[number]()
        except BaseException as error:
            errors[number] = error

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a thread waits for ever"
    return results, errors


def test_on_its_own_it_is_torchs(batches: list[tuple[int, ...]]) -> None:
    matrix = symmetric(0, 5, 5)
    assert torch.equal(eigh(matrix)[1], torch.linalg.eigh(matrix)[1])
    assert batches == [(5, 5)] * 2


def test_equal_shapes_are_one_batch_and_every_thread_gets_its_own(batches: list[tuple[int, ...]]) -> None:
    matrices = [symmetric(n, 6, 6) for n in range(4)]
    found, errors = in_step(*(lambda m=m: eigh(m) for m in matrices))
    assert errors == [None] * 4 and batches == [(4, 6, 6)]
    for matrix, (values, vectors) in zip(matrices, found, strict=True):
        assert torch.allclose(matrix @ vectors, vectors * values, atol=1e-10)
        assert (values.diff() >= 0).all()


def test_other_shapes_and_dtypes_are_batches_of_their_own(batches: list[tuple[int, ...]]) -> None:
    matrices = [symmetric(0, 4, 4), symmetric(1, 7, 7), symmetric(2, 4, 4), symmetric(3, 4, 4).float()]
    found, errors = in_step(*(lambda m=m: eigh(m) for m in matrices))
    assert errors == [None] * 4 and sorted(batches) == [(1, 4, 4), (1, 7, 7), (2, 4, 4)]
    assert [vectors.dtype for _, vectors in found] == [torch.float64] * 3 + [torch.float32]


def test_matrices_that_are_batches_already(batches: list[tuple[int, ...]]) -> None:
    moments = [symmetric(n, 3, 5, 5) for n in range(2)]
    found, _ = in_step(*(lambda m=m: principal_axes(m) for m in moments))
    assert batches == [(2, 3, 5, 5)]
    for own, (axes, energy) in zip(moments, found, strict=True):
        torch.testing.assert_close((axes, energy), principal_axes(own))


@pytest.mark.parametrize("seed", range(5))
def test_what_goes_together_does_not_depend_on_who_is_fast(batches: list[tuple[int, ...]], seed: int) -> None:
    pauses = random.Random(seed)

    def job(rounds: int) -> Callable[[], list[Tensor]]:
        waits = [pauses.random() / 200 for _ in range(rounds)]

        def work() -> list[Tensor]:
            found = []
            for number, wait in enumerate(waits):
                time.sleep(wait)
                found.append(eigh(symmetric(number, 4 + number % 2, 4 + number % 2))[0])
            return found

        return work

    found, errors = in_step(*(job(rounds) for rounds in (3, 1, 0, 2, 3)))
    assert errors == [None] * 5 and [len(x) for x in found] == [3, 1, 0, 2, 3]
    assert batches == [(4, 4, 4), (3, 5, 5), (2, 4, 4)]  # the faster wait, those that have ended are not waited for


def test_svds_in_step_are_those_of_each_alone() -> None:
    matrices = [torch.randn(40, 90 - 10 * n, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    jobs = [lambda m=m, f=f: f(m) for m in matrices for f in (lambda m: exact_svd(m, 4), _fast)]
    found, errors = in_step(*jobs)
    assert errors == [None] * 6
    for job, parts in zip(jobs, found, strict=True):
        torch.testing.assert_close(job(), parts)


def _fast(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return fast_svd(matrix, 3, seed=0)


def test_an_error_ends_those_who_wait() -> None:
    def fails() -> None:
        time.sleep(0.02)  # the others wait by now
        raise ValueError("mine")

    _, errors = in_step(lambda: eigh(symmetric(0, 3, 3)), fails, lambda: eigh(symmetric(1, 3, 3)))
    assert [type(error) for error in errors] == [GivenUp, ValueError, GivenUp]
    assert eigen._here.eigh is None


def test_a_decomposition_that_fails_is_told_once() -> None:
    def broken() -> Any:
        return eigh(torch.full((3, 3), float("nan"), dtype=torch.float64))

    _, errors = in_step(broken, broken, broken)
    kinds = sorted(type(error).__name__ for error in errors)
    assert kinds.count("GivenUp") == 2 and "LinAlgError" in kinds[-1]
    _, errors = in_step(broken, broken, lambda: None)  # where the last thread ends, and so begins the decomposition
    assert sum(isinstance(error, RuntimeError) for error in errors) == 1


def test_giving_up_from_outside() -> None:
    step, ended = Step(2), threading.Event()

    def work() -> None:
        with pytest.raises(GivenUp), step.member(0):
            eigh(symmetric(0, 3, 3))  # the other never comes
        ended.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    time.sleep(0.02)
    assert not ended.is_set()
    step.give_up()
    assert ended.wait(10)
