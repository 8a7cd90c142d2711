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
from basiscli.linalg.eigen import Aborted, Lockstep, eigh
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
    step = Lockstep(len(jobs))
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
    assert [type(error) for error in errors] == [Aborted, ValueError, Aborted]
    assert eigen._here.eigh is None


def test_a_decomposition_that_fails_is_told_once() -> None:
    def broken() -> Any:
        return eigh(torch.full((3, 3), float("nan"), dtype=torch.float64))

    _, errors = in_step(broken, broken, broken)
    kinds = sorted(type(error).__name__ for error in errors)
    assert kinds.count("Aborted") == 2 and "LinAlgError" in kinds[-1]
    _, errors = in_step(broken, broken, lambda: None)  # where the last thread ends, and so begins the decomposition
    assert sum(isinstance(error, RuntimeError) for error in errors) == 1


def test_giving_up_from_outside() -> None:
    step, ended = Lockstep(2), threading.Event()

    def work() -> None:
        with pytest.raises(Aborted), step.member(0):
            eigh(symmetric(0, 3, 3))  # the other never comes
        ended.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    time.sleep(0.02)
    assert not ended.is_set()
    step.abort()
    assert ended.wait(10)


# What a GPU returns ---------------------------------------------------------------------------------------------------


@pytest.fixture
def as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eigen, "_CHECKED", frozenset({"cpu"}))


LOW_RANK = symmetric(1, 200, 3)
SOUND = {
    "one number": symmetric(0, 1, 1),
    "ordinary": symmetric(0, 300, 300),
    "a batch": symmetric(0, 3, 40, 40),
    "low rank": LOW_RANK,
    "huge beside tiny": LOW_RANK * 1e200 + symmetric(2, 200, 200) * 1e180,
    "nothing": torch.zeros(50, 50, dtype=torch.float64),
    "one value": torch.eye(50, dtype=torch.float64),
    "float32": symmetric(0, 64, 64).float(),
    "empty": torch.zeros(0, 0, dtype=torch.float64),
    "no matrices": torch.zeros(0, 4, 4, dtype=torch.float64),
}


@pytest.mark.usefixtures("as_a_gpu")
@pytest.mark.parametrize("name", SOUND)
def test_what_holds_is_taken(batches: list[tuple[int, ...]], name: str) -> None:
    matrix = SOUND[name]
    above = torch.randn(matrix.shape, dtype=matrix.dtype).triu(1)  # is not read
    values, vectors = eigh(matrix.tril() + above)
    assert batches == [tuple(matrix.shape)], "decomposed once"
    scale = float(values.abs().max()) if values.numel() else 0.0
    error = (matrix @ vectors - vectors * values[..., None, :]).abs()
    assert not error.numel() or float(error.max()) <= 1e3 * torch.finfo(matrix.dtype).eps * scale


WRONG: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "the diagonal and the identity": lambda a, w, v: (a.diagonal(dim1=-2, dim2=-1), torch.eye(60).to(v).expand_as(v)),
    "two columns the same": lambda a, w, v: (w, torch.cat([v[..., :1], v[..., :-1]], -1)),
    "a column of another length": lambda a, w, v: (w, v * (1 + 1e-6 * torch.eye(60)[7]).to(v)),
    "values in another order": lambda a, w, v: (w.flip(-1), v),
    "one value": lambda a, w, v: (w * (1 + 1e-6 * torch.eye(60)[-1]).to(w), v),
    "not a number": lambda a, w, v: (w, v.clone().fill_(torch.nan)),
    "one of a batch": lambda a, w, v: (w, torch.cat([v[:1], v[1:] + 1e-6])),
}


@pytest.mark.usefixtures("as_a_gpu")
@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_hold_is_not(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    matrix, plain, calls = symmetric(0, 2, 60, 60), torch.linalg.eigh, []

    def first_wrong(given: Tensor) -> Any:
        calls.append(given)
        return plain(given) if len(calls) > 1 else WRONG[name](given, *plain(given))

    monkeypatch.setattr(torch.linalg, "eigh", first_wrong)
    with pytest.warns(UserWarning, match=r"\[2, 60, 60\] from cpu are wrong"):
        values, vectors = eigh(matrix)
    torch.testing.assert_close((values, vectors), tuple(plain(matrix)), rtol=0, atol=0)


@pytest.mark.usefixtures("as_a_gpu")
def test_what_fails_there_is_done_here(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, plain, calls = symmetric(0, 9, 9), torch.linalg.eigh, []

    def first_fails(given: Tensor) -> Any:
        calls.append(given)
        if len(calls) == 1:
            raise torch.linalg.LinAlgError("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED")
        return plain(given)

    monkeypatch.setattr(torch.linalg, "eigh", first_fails)
    with pytest.warns(UserWarning, match="the CPU's are taken"):
        assert torch.equal(eigh(matrix)[0], plain(matrix)[0])
    with pytest.raises(torch.linalg.LinAlgError):
        eigh(torch.full((3, 3), torch.nan, dtype=torch.float64))


@pytest.mark.usefixtures("as_a_gpu")
def test_batches_of_a_step_are_tried_too(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[torch.Size] = []
    holds = eigen._holds

    def noting(matrix: Tensor, values: Tensor, vectors: Tensor) -> bool:
        tried.append(matrix.shape)
        return holds(matrix, values, vectors)

    monkeypatch.setattr(eigen, "_holds", noting)
    in_step(*(lambda n=n: eigh(symmetric(n, 6, 6)) for n in range(3)))
    assert tried == [torch.Size([3, 6, 6])]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "shape", [(1, 1), (64, 64), (576, 576), (2048, 2048), (16, 256, 256), (3, 1024, 1024)], ids=str
)
@pytest.mark.parametrize("rank", [8, None])
def test_a_gpus_are_those_of_the_cpu(shape: tuple[int, ...], rank: int | None) -> None:
    """No warning, which would be an error here: what the GPU returned was taken."""
    matrix = symmetric(0, *shape[:-1], rank or shape[-1])
    values, vectors = eigh(matrix.cuda())
    torch.testing.assert_close(values.cpu(), torch.linalg.eigvalsh(matrix), rtol=1e-10, atol=1e-8)
    rebuilt = (vectors * values[..., None, :]) @ vectors.mT
    torch.testing.assert_close(rebuilt.cpu(), matrix, rtol=1e-9, atol=1e-8)
