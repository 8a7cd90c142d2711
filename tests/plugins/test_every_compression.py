"""Every registered KV method: its bases, its losses, its parameters and its page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from basiscli.linalg.orthogonal import orthogonality_error
from basiscli.registry import Registry
from basiscli.transforms import AttentionMoments, KVCompression, Method

REGISTRY = Registry()
LAYERS, HEADS, DIM = 3, 2, 16
DOCS = Path(__file__).parents[2] / "docs" / "methods"


@pytest.fixture(params=REGISTRY.names("compress"))
def method(request: pytest.FixtureRequest) -> Method:
    return REGISTRY.find("compress", request.param)


def made(method: Method, **parameters: Any) -> KVCompression:
    compression: KVCompression = method.implementation(method.validate(parameters))
    return compression


def moments(seed: int, scale: float = 1.0) -> AttentionMoments:
    generator = torch.Generator().manual_seed(seed)

    def one() -> Tensor:
        x = torch.randn(LAYERS, HEADS, 4 * DIM, DIM, generator=generator, dtype=torch.float64)
        x = x * torch.logspace(0, -2, DIM, dtype=torch.float64)[torch.randperm(DIM, generator=generator)]
        return scale * x.mT @ x

    return AttentionMoments(one(), one(), one(), one())


def test_the_start_is_orthogonal_and_deterministic(method: Method) -> None:
    start = made(method).start(moments(0))
    assert start.shape == (LAYERS, 2, HEADS, DIM, DIM)
    assert start.dtype == torch.float32
    assert orthogonality_error(start) < 1e-5
    assert torch.equal(start, made(method).start(moments(0)))


def test_the_start_does_not_depend_on_the_number_of_tokens(method: Method) -> None:
    """Four times the tokens of the same kind are four times the moments: the axes are the same."""
    few, many = made(method).start(moments(0)), made(method).start(moments(0, scale=4.0))
    torch.testing.assert_close(few, many, rtol=0, atol=1e-5)


def test_the_start_survives_heads_that_never_spoke(method: Method) -> None:
    """A dead head has zero moments, and a short text has fewer tokens than dimensions."""
    silent = moments(1)
    for matrix in (silent.keys, silent.values, silent.queries, silent.outputs):
        matrix[0, 0] = 0.0
        matrix[1, 1] = torch.diag(torch.eye(DIM, dtype=torch.float64)[0])
    start = made(method).start(silent)
    assert torch.isfinite(start).all()
    assert orthogonality_error(start) < 1e-5


def test_no_free_parameters_give_the_start_and_any_stay_orthogonal(method: Method) -> None:
    compression = made(method)
    start = compression.start(moments(2))
    assert torch.equal(compression.turned(start, torch.zeros_like(start)), start)
    free = torch.randn(start.shape, generator=torch.Generator().manual_seed(0))
    assert orthogonality_error(compression.turned(start, free)) < 2e-5


def test_ranks_are_drawn_within_the_levels(method: Method) -> None:
    compression, shape = made(method), (LAYERS, 2, HEADS)
    drawn = [compression.draw(shape, 8, torch.Generator().manual_seed(seed)) for seed in range(200)]
    assert all(ranks.shape == shape for ranks in drawn)
    together = torch.stack(drawn)
    assert int(together.min()) == 1
    assert int(together.max()) == 8
    assert torch.equal(drawn[3], compression.draw(shape, 8, torch.Generator().manual_seed(3)))


def test_the_loss_is_least_where_the_student_is_the_teacher_and_right(method: Method) -> None:
    teacher = 4 * torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
    labels = teacher.argmax(-1)
    compression = made(method)
    worse = teacher + torch.randn(teacher.shape, generator=torch.Generator().manual_seed(1))
    assert compression.loss(teacher, teacher, labels) < compression.loss(worse, teacher, labels)


def test_the_learning_rate_rises_falls_and_ends_near_zero(method: Method) -> None:
    rates = [made(method).learning_rate(step, 1000) for step in range(1000)]
    assert all(rate >= 0 for rate in rates)
    assert rates[-1] < 0.01 * max(rates)
    assert made(method).learning_rate(0, 1) > 0


def test_it_has_a_page_that_names_its_parameters(method: Method) -> None:
    page = (DOCS / f"{method.name}.md").read_text()
    assert method.source.rpartition("arXiv ")[2] in page
    for name in method.parameters.model_fields:
        assert f"`{name}`" in page, f"{name} is not on the page"
