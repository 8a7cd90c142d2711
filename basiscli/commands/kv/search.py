"""Search of the ranks of keys and values for each layer and KV head, within a budget.

Ranks are counted in levels: equal steps of d/8 dimensions. A budget is the sum of all levels.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from basiscli.calibration.tokens import Windows
from basiscli.commands.kv.attention import Projector, cut_projections, set_bases, set_projections
from basiscli.commands.kv.loss import divergence, loss_alone, loss_and_gradient
from basiscli.commands.kv.plan import SEARCH_BATCH, TEACHER_BYTES
from basiscli.errors import InputError
from basiscli.progress import Progress
from basiscli.transforms import KVCompression

Shape = tuple[int, ...]
_MOST_ROUNDS = 24
_PATIENCE = 3  # rounds without a better result, after which the search ends
_KEPT = 0.5  # of an earlier round's estimate


def uniform(shape: Shape, levels: int, budget: int) -> Tensor:
    """Return equal levels of a shape with sum `budget`; a remainder is spread evenly over the layers."""
    count = math.prod(shape)
    indices = torch.arange(count + 1) * budget // count
    return indices.diff().view(shape)


def spectrum(energy: Tensor, levels: int, budget: int) -> Tensor:
    """Return the levels [layers, 2, KV heads] that keep most of the energy, relative to each head's total.

    Args:
        energy: of every column of the bases [layers, 2, KV heads, d], falling.
        levels: per head.
        budget: sum of the result; every head keeps at least one level.
    """
    steps = energy.unflatten(-1, (levels, -1)).sum(-1).flatten(0, -2)
    steps = steps / steps.sum(-1, keepdim=True).clamp_min(torch.finfo(steps.dtype).tiny)
    chosen = [1] * len(steps)
    queue = [(-float(gains[1]), entry) for entry, gains in enumerate(steps)] if levels > 1 else []
    heapq.heapify(queue)
    for _ in range(budget - len(steps)):
        _, entry = heapq.heappop(queue)
        chosen[entry] += 1
        if chosen[entry] < levels:
            heapq.heappush(queue, (-float(steps[entry][chosen[entry]]), entry))
    return torch.tensor(chosen).view(energy.shape[:-1])


@dataclass(frozen=True)
class Found:
    """The result of a search: levels for one budget, and what they cost."""

    levels: Tensor
    """Integers [layers, 2 (keys, values), KV heads], from 1 to the number of levels."""
    loss: float
    """The method's loss with these ranks on the held-out windows."""
    divergence: float
    """KL divergence from the dense model on the same, in nats a token."""


@dataclass
class GreedySearch:
    """Finds ranks by moving levels between heads: lower where the loss rises least, raise where it falls most.

    The published search lowers one entry (layer, keys or values, head) at a time from full ranks on and tries every
    entry with forwards of its own. Here two forwards and backwards give the cost of lowering and the gain of raising
    every entry by one level at once: with the level's columns at half strength, the derivative of the loss by that
    strength is the difference that the whole level makes, exactly where the loss is quadratic in it. So each round can
    use other text, the search does not overfit a few windows, and held-out windows decide which round's ranks are kept.
    """

    model: Any
    projectors: Sequence[Projector]
    method: KVCompression
    bases: Tensor
    windows: Windows
    """Text of the rounds, a batch each in turn."""
    held: Windows
    """Held-out text, by which the best round is chosen."""
    levels: int
    batch: int = SEARCH_BATCH
    """Windows per round."""
    rounds: int = 0
    round_seconds: float = 0.0
    """Seconds of all rounds together."""
    _teachers: dict[int, Tensor] = field(default_factory=dict)

    def run(self, starts: Sequence[Tensor], progress: Progress) -> Found:
        """Return the best ranks found, beginning at the best of `starts`, which all have the same budget.

        Raises:
            InputError: all tokens of the windows are masked (label −100).
        """
        for windows in (self.windows, self.held):
            if bool((windows.labels == -100).all()):
                raise InputError(
                    "no token of the search's windows counts",
                    file=windows.name,
                    remedy="give text with --calibration, or --search spectrum",
                )
        self.bases = self.bases.to(next(self.model.parameters()).device)
        moves = max(2, starts[0].numel() // 15)
        unknown = torch.full(starts[0].shape, math.nan)
        cost, gain = unknown.clone(), unknown.clone()
        progress.start("searching", _MOST_ROUNDS, _MOST_ROUNDS, "rounds")
        started = time.perf_counter()
        try:
            best_loss, levels = min(((self._held_loss(s), s) for s in starts), key=lambda pair: pair[0])
            best, waited = levels, 0
            while waited < _PATIENCE and self.rounds < _MOST_ROUNDS:
                batch = self._next_batch()
                teacher = self._logits(batch, None)
                for estimate, step in ((cost, -1), (gain, 0)):
                    fresh = self._differences(batch, teacher, levels + step)
                    estimate.copy_(torch.where(estimate.isnan(), fresh, _KEPT * estimate + (1 - _KEPT) * fresh))
                levels, moved = move_levels(levels, cost, gain, moves, self.levels)
                self.rounds += 1
                progress.advance(1)
                if not moved:
                    break
                loss = self._held_loss(levels)
                waited = 0 if loss < best_loss else waited + 1
                if loss < best_loss:
                    best_loss, best = loss, levels
                progress.note(f"loss {best_loss:.4f}")
            self.round_seconds = time.perf_counter() - started
            return Found(best, best_loss, self._held_divergence(best))
        finally:
            set_bases(self.projectors, None)

    def _differences(self, batch: Windows, teacher: Tensor, steps: Tensor) -> Tensor:
        """Return how much the loss falls, for every entry, when the step of this number (from 0) is kept.

        All entries' steps stand at half strength; steps below are kept, those above are not. An entry without such a
        step gets 0.
        """
        unit = self.bases.shape[-1] // self.levels
        number = torch.arange(self.levels)
        own = (number == steps[..., None]).float()
        strength = ((number < steps[..., None]).float() + 0.5 * own).requires_grad_(True)
        with torch.enable_grad():
            columns = strength.repeat_interleave(unit, -1).to(self.bases.device)
            set_projections(self.projectors, cut_projections(self.bases, columns))
            student = self.model(**self._inputs(batch), use_cache=False).logits
        _, gradient = loss_and_gradient(self.method, student.detach(), teacher, batch.labels.to(student.device))
        student.backward(gradient)
        assert strength.grad is not None
        return -(strength.grad * own).sum(-1)

    def _held_loss(self, levels: Tensor) -> float:
        total, count = 0.0, 0
        for index in range(len(self.held)):
            one = self.held.select([index])
            counted = int((one.labels != -100).sum())
            if counted:
                student, teacher = self._logits(one, levels), self._held_teacher(index)
                loss = loss_alone(self.method, student, teacher, one.labels.to(student.device))
                total, count = total + counted * loss, count + counted
        return total / count

    def _held_divergence(self, levels: Tensor) -> float:
        total, count = 0.0, 0
        for index in range(len(self.held)):
            one = self.held.select([index])
            total += divergence(self._logits(one, levels), self._held_teacher(index), one.labels)
            count += int((one.labels != -100).sum())
        return total / count

    def _held_teacher(self, index: int) -> Tensor:
        """Return the dense model's logits of one held-out window, computed once as long as they take little memory."""
        if index in self._teachers:
            return self._teachers[index]
        logits = self._logits(self.held.select([index]), None)
        if logits.nbytes * len(self.held) <= TEACHER_BYTES:
            self._teachers[index] = logits
        return logits

    def _logits(self, batch: Windows, levels: Tensor | None) -> Tensor:
        """Return the logits with projections cut at such levels, or of the dense model."""
        ranks = None if levels is None else levels * (self.bases.shape[-1] // self.levels)
        set_bases(self.projectors, self.bases, ranks)
        with torch.no_grad():
            logits: Tensor = self.model(**self._inputs(batch), use_cache=False).logits
        return logits

    def _inputs(self, batch: Windows) -> dict[str, Tensor]:
        return {name: x.to(self.bases.device) for name, x in batch.inputs.items()}

    def _next_batch(self) -> Windows:
        """Return the next windows in turn, spread over the text; those without a token that counts are passed over."""
        usable = (self.windows.labels != -100).any(1).nonzero().flatten()
        stride = max(1, len(usable) // self.batch)
        indices = (self.rounds + torch.arange(self.batch) * stride) % len(usable)
        return self.windows.select(usable[indices.unique()])


def move_levels(levels: Tensor, cost: Tensor, gain: Tensor, moves: int, most: int) -> tuple[Tensor, int]:
    """Lower the entries where it costs least and raise as many where it gains most, while a pair lowers the loss.

    Args:
        levels: of every entry, any shape.
        cost: rise of the loss when an entry is lowered by one; updated in index for entries that move: the gain of
            raising becomes the cost of lowering, the reverse for the other, and the next one is unknown (NaN).
        gain: fall of the loss when an entry is raised by one; updated likewise.
        moves: pairs at most.
        most: the highest level; the lowest is 1.

    Returns:
        The new levels, with the same sum, and the number of pairs.
    """
    new, cost, gain = levels.flatten().clone(), cost.view(-1), gain.view(-1)
    rising = torch.where(new < most, gain, -math.inf).argsort(descending=True, stable=True).tolist()
    falling = torch.where(new > 1, cost, math.inf).argsort(stable=True).tolist()
    used: set[int] = set()  # an entry may both gain by a step more and do without its last one: it moves once
    for high in rising:
        low = next((entry for entry in falling if entry not in used and entry != high), None)
        if high in used or low is None:
            continue
        if len(used) >= 2 * moves or new[low] <= 1 or new[high] >= most or gain[high] <= cost[low]:
            break
        new[low] -= 1
        new[high] += 1
        gain[low], cost[low] = cost[low].clone(), math.nan
        cost[high], gain[high] = gain[high].clone(), math.nan
        used |= {low, high}
    return new.view_as(levels), len(used) // 2
