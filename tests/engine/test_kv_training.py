"""Training of KV bases: it helps, it keeps them orthogonal, and an interruption changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from basis_plugins.compress.matryoshka import Matryoshka, MatryoshkaParameters
from torch import Tensor

from basiscli.commands.kv.attention import Projector, set_bases
from basiscli.commands.kv.loss import loss_and_gradient
from basiscli.commands.kv.training import Training
from basiscli.errors import InputError
from basiscli.linalg.orthogonal import orthogonality_error
from basiscli.progress import Silent
from basiscli.runtime.kv_projection import attach
from tests.kv_models import make_model, random_bases, text_windows

LEVELS = 8
STEPS = 8


class StopAfter(Silent):
    """Interrupts after so many steps, as Ctrl-C does."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def advance(self, size: int) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def method(**parameters: Any) -> Matryoshka:
    return Matryoshka(MatryoshkaParameters(**parameters))


@pytest.fixture
def training(tmp_path: Path) -> Callable[..., Training]:
    """Return a function that prepares a training of a tiny model, its state in a file of the given name."""

    def prepare(name: str = "state", how: Matryoshka | None = None, **changes: Any) -> Training:
        model = make_model()
        projectors = [Projector() for _ in model.model.layers]
        attach(model, projectors)
        options: dict[str, Any] = {
            "windows": text_windows(),
            "steps": STEPS,
            "batch": 2,
            "levels": LEVELS,
            "seed": 3,
            "state_file": tmp_path / f"{name}.safetensors",
            "save_seconds": 0.0,
        }
        start = random_bases(len(projectors), 2, 16)
        return Training(model, projectors, how or method(learning_rate=0.05), start, **options | changes)

    return prepare


def divergence(run: Training, bases: Tensor, rank: int) -> float:
    """Return the mean KL divergence from the dense model with so many columns of every basis."""
    inputs = run.windows.inputs
    with torch.no_grad():
        set_bases(run.projectors, None)
        p = run.model(**inputs).logits.double().log_softmax(-1)
        set_bases(run.projectors, bases, torch.full(bases.shape[:3], rank))
        q = run.model(**inputs).logits.double().log_softmax(-1)
        set_bases(run.projectors, None)
    return float((p.exp() * (p - q)).sum(-1).mean())


# What training does ---------------------------------------------------------------------------------------------------


def test_training_brings_the_small_cache_nearer_to_the_model(training: Callable[..., Training]) -> None:
    run = training(steps=40, how=method(learning_rate=0.05, kl_weight=1.0))
    bases = run.run(Silent())
    assert bases.shape == run.start.shape
    assert bases.dtype == torch.float32
    assert orthogonality_error(bases) < 1e-5
    for rank in (4, 8, 12):
        assert divergence(run, bases, rank) < 0.8 * divergence(run, run.start, rank)
    assert len(run.losses) == 40
    assert sum(run.losses[-10:]) < sum(run.losses[:10])


def test_a_rate_of_next_to_nothing_leaves_the_start(training: Callable[..., Training]) -> None:
    run = training(how=method(learning_rate=1e-30))
    torch.testing.assert_close(run.run(Silent()), run.start, rtol=0, atol=1e-6)


def test_the_model_is_as_it_was(training: Callable[..., Training]) -> None:
    run = training()
    before = {name: x.clone() for name, x in run.model.state_dict().items()}
    run.run(Silent())
    after = run.model.state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    assert all(parameter.grad is None for parameter in run.model.parameters())
    assert all(projector.key is projector.value is None for projector in run.projectors)


def test_large_steps_keep_the_bases_orthogonal(training: Callable[..., Training]) -> None:
    assert orthogonality_error(training(how=method(learning_rate=1.0)).run(Silent())) < 1e-5


def test_the_seed_decides_the_result(training: Callable[..., Training]) -> None:
    first, same, other = (training(str(n), seed=seed).run(Silent()) for n, seed in enumerate((3, 3, 4)))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("seed", [-7, 2**60, 2**70])
def test_any_number_is_a_seed(training: Callable[..., Training], seed: int) -> None:
    assert orthogonality_error(training(seed=seed, steps=1).run(Silent())) < 1e-5


def test_every_epoch_takes_all_windows_in_another_order(training: Callable[..., Training]) -> None:
    run = training(windows=text_windows(count=5))
    taken = torch.cat([run._window_indices(step) for step in range(10)]).view(4, 5)
    assert taken.sort(-1).values.tolist() == [[0, 1, 2, 3, 4]] * 4
    assert len({tuple(epoch) for epoch in taken.tolist()}) > 1
    assert torch.equal(training(windows=text_windows(count=5))._window_indices(7), run._window_indices(7))


def test_a_batch_may_be_larger_than_all_windows(training: Callable[..., Training]) -> None:
    run = training(windows=text_windows(count=2), batch=5, steps=2)
    assert orthogonality_error(run.run(Silent())) < 1e-5


# Interruption ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [1, 2, 5, STEPS])
def test_an_interrupted_training_goes_on_to_the_same_bases(training: Callable[..., Training], after: int) -> None:
    whole = training("whole")
    expected = whole.run(Silent())
    stopped = training("stopped")
    with pytest.raises(KeyboardInterrupt):
        stopped.run(StopAfter(after))
    assert stopped.state_file.is_file() == (after > 1)  # the last step was not saved any more
    assert all(projector.key is None for projector in stopped.projectors)
    resumed = training("stopped")
    assert torch.equal(resumed.run(Silent()), expected)
    assert resumed.losses == whole.losses


def test_interrupted_again_and_again(training: Callable[..., Training]) -> None:
    expected = training("whole").run(Silent())
    for _ in range(STEPS - 2):
        with pytest.raises(KeyboardInterrupt):
            training("stopped").run(StopAfter(2))
    assert torch.equal(training("stopped").run(Silent()), expected)


def test_a_finished_training_is_not_repeated(training: Callable[..., Training]) -> None:
    expected = training().run(Silent())
    assert torch.equal(training().run(StopAfter(1)), expected)  # no step is left to interrupt


@pytest.mark.parametrize("size", [0, 7, 200, -1])
def test_a_truncated_state_begins_anew(training: Callable[..., Training], size: int) -> None:
    expected = training("whole").run(Silent())
    stopped = training("stopped")
    with pytest.raises(KeyboardInterrupt):
        stopped.run(StopAfter(4))
    raw = stopped.state_file.read_bytes()
    stopped.state_file.write_bytes(raw[:size])
    resumed = training("stopped")
    assert torch.equal(resumed.run(Silent()), expected)
    assert len(resumed.losses) == STEPS


def test_an_interruption_while_the_state_is_saved(
    training: Callable[..., Training], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new state replaces the old one only when it is whole."""
    expected = training("whole").run(Silent())
    stopped = training("stopped")
    with pytest.raises(KeyboardInterrupt):
        stopped.run(StopAfter(4))
    raw = stopped.state_file.read_bytes()
    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        training("stopped").run(Silent())
    monkeypatch.undo()
    assert stopped.state_file.read_bytes() == raw
    assert torch.equal(training("stopped").run(Silent()), expected)


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


# What cannot be trained -----------------------------------------------------------------------------------------------


class Spoilt(Matryoshka):
    """Its loss is no number from the third step on."""

    calls = 0

    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        return super().loss(student, teacher, labels) * (1.0 if self.calls < 3 else float("nan"))


def test_a_loss_that_is_no_number(training: Callable[..., Training]) -> None:
    run = training(how=Spoilt(MatryoshkaParameters()))  # 62 tokens a step are one call of the loss
    with pytest.raises(InputError, match="the loss of training step 2 is nan") as caught:
        run.run(Silent())
    assert "learning_rate" in str(caught.value.remedy)
    assert all(projector.key is None for projector in run.projectors)


def test_a_last_step_that_goes_astray(training: Callable[..., Training], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Matryoshka, "learning_rate", lambda *_: float("nan"))
    with pytest.raises(InputError, match="after the last training step"):
        training(steps=1).run(Silent())


# The loss -------------------------------------------------------------------------------------------------------------


def logits_and_labels(tokens: int, vocabulary: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2, tokens, vocabulary, generator=generator) for _ in range(2))
    labels = torch.randint(0, vocabulary, (2, tokens), generator=generator)
    labels[0, tokens // 2 :] = -100
    labels[:, -1] = -100
    return student, teacher, labels


@pytest.mark.parametrize("tokens", [4, 43, 129])  # less than a block of 64, one exactly, several
def test_the_loss_in_blocks_is_that_of_all_tokens(training: Callable[..., Training], tokens: int) -> None:
    run = training(how=method(kl_weight=0.4))
    student, teacher, labels = logits_and_labels(tokens)
    loss, gradient = loss_and_gradient(run.method, student, teacher, labels)
    whole = student.double().requires_grad_(True)
    counted = labels != -100
    expected = run.method.loss(whole[counted], teacher.double()[counted], labels[counted])
    expected.backward()
    assert whole.grad is not None
    assert loss == pytest.approx(float(expected.detach()), rel=1e-6)
    torch.testing.assert_close(gradient.double(), whole.grad, rtol=1e-5, atol=1e-8)
    assert (gradient[labels == -100] == 0).all()


def test_the_loss_is_its_formula() -> None:
    student, teacher, labels = (x[1, :9] for x in logits_and_labels(10))
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    divergence = sum(float((p[t] * (p[t] / q[t]).log()).sum()) for t in range(9)) / 9
    entropy = -sum(float(q[t, label].log()) for t, label in enumerate(labels.tolist())) / 9
    for share in (0.0, 0.25, 1.0):
        found = float(method(kl_weight=share).loss(student, teacher, labels))
        assert found == pytest.approx(share * divergence + (1 - share) * entropy, rel=1e-5)


def test_ranks_are_drawn_apart_for_every_basis_and_depend_on_the_generator_alone() -> None:
    drawn = method().draw((30, 2, 4), 8, torch.Generator().manual_seed(1))
    assert drawn.unique().tolist() == list(range(1, 9))
    assert not (drawn[:, 0] == drawn[:, 1]).all()
    assert torch.equal(drawn, method().draw((30, 2, 4), 8, torch.Generator().manual_seed(1)))
    assert not torch.equal(drawn, method().draw((30, 2, 4), 8, torch.Generator().manual_seed(2)))
