"""How many dimensions each layer's KV heads keep, of keys and of values, within a budget.

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
    """Return the same level for every entry; what the budget leaves over is spread evenly over the layers."""
    count = math.prod(shape)
    places = torch.arange(count + 1) * budget // count
    return places.diff().view(shape)


def spectrum(energy: Tensor, levels: int, budget: int) -> Tensor:
    """Return the levels that keep most of the energy, each entry's counted as a share of its own.

    Args:
        energy: of every column [layers, 2, KV heads, d], the columns in falling importance.
        levels: steps per entry.
        budget: sum of the result; every entry keeps one level.
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
    """Ranks for one budget."""

    levels: Tensor
    """[layers, 2, KV heads]."""
    loss: float
    """The method's loss with these ranks on the held-out windows."""
    divergence: float
    """KL divergence from the dense model on the same, in nats a token."""


@dataclass
class GreedySearch:
    """TensorStore, again and again, the steps that cost least for those that gain most; keep what serves held-out text.

    The published search lowers one entry at a time from full ranks on and tries every entry with forwards of its own.
    Here two forwards and backwards tell the cost of lowering and the gain of raising every entry by one step at once:
    with the step's columns at half strength, the derivative of the loss by that strength is the difference that the
    whole step makes, exactly where the loss is quadratic in it. So each round can afford text of its own, and the
    search does not fit a few windows; and what no round's text can deceive it about, held-out windows decide.
    """

    model: Any
    projectors: Sequence[Projector]
    method: KVCompression
    bases: Tensor
    windows: Windows
    """What rounds take their text from, in turn."""
    held: Windows
    levels: int
    batch: int = SEARCH_BATCH
    """Windows a round."""
    rounds: int = 0
    round_seconds: float = 0.0
    """Of all rounds together."""
    _teachers: dict[int, Tensor] = field(default_factory=dict)

    def run(self, starts: Sequence[Tensor], progress: Progress) -> Found:
        """Return the best ranks found; all starts have the same budget, and the best of them is where it begins.

        Raises:
            InputError: no token of the windows counts.
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
                levels, moved = exchanged(levels, cost, gain, moves, self.levels)
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
        for place in range(len(self.held)):
            one = self.held.select([place])
            counted = int((one.labels != -100).sum())
            if counted:
                student, teacher = self._logits(one, levels), self._held_teacher(place)
                loss = loss_alone(self.method, student, teacher, one.labels.to(student.device))
                total, count = total + counted * loss, count + counted
        return total / count

    def _held_divergence(self, levels: Tensor) -> float:
        total, count = 0.0, 0
        for place in range(len(self.held)):
            one = self.held.select([place])
            total += divergence(self._logits(one, levels), self._held_teacher(place), one.labels)
            count += int((one.labels != -100).sum())
        return total / count

    def _held_teacher(self, place: int) -> Tensor:
        """Return the dense model's logits of one held-out window, computed once as long as they take little memory."""
        if place in self._teachers:
            return self._teachers[place]
        logits = self._logits(self.held.select([place]), None)
        if logits.nbytes * len(self.held) <= TEACHER_BYTES:
            self._teachers[place] = logits
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
        places = (self.rounds + torch.arange(self.batch) * stride) % len(usable)
        return self.windows.select(usable[places.unique()])


def exchanged(levels: Tensor, cost: Tensor, gain: Tensor, moves: int, most: int) -> tuple[Tensor, int]:
    """Lower the entries where it costs least and raise as many where it gains most, while a pair is worth it.

    Args:
        levels: of every entry.
        cost: of lowering each by one; for those that were moved it is updated in place: what raising gained is what
            lowering costs, and the other way round, and what comes after that is not known (NaN).
        gain: of raising each by one, likewise.
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
