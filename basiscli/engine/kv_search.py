"""How many dimensions each layer's KV heads keep, of keys and of values, within a budget.

Ranks are counted in levels: equal steps of d/8 dimensions. A budget is the sum of all levels.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from basiscli.calibration.tokens import Windows
from basiscli.engine.kv_attention import Projector, projections, set_bases
from basiscli.engine.local import Progress
from basiscli.errors import InputError

Shape = tuple[int, ...]


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
    divergence: float
    """KL divergence from the dense model with these ranks, in nats a token, on the search's windows."""


@dataclass
class GreedySearch:
    """Lower, again and again, what costs least: KL divergence from the dense model, measured, on a few windows.

    The published search tries every entry in every round. Here an entry's cost is measured once, and again only after
    it was lowered (the costs of the others are those of an earlier round); a round lowers one entry in twenty; and a
    trial starts at the layer that it changes, from hidden states kept of the present ranks.
    """

    model: Any
    projectors: Sequence[Projector]
    bases: Tensor
    windows: Windows
    levels: int
    batch: int = 1
    """Trials of one layer that run in one forward."""
    trials: int = 0
    trial_seconds: float = 0.0
    """Of all trials together."""
    _teacher: Tensor = field(default_factory=lambda: torch.zeros(0))
    _counted: Tensor = field(default_factory=lambda: torch.zeros(0))
    _negentropy: float = 0.0
    _divergence: float = 0.0

    def run(self, budgets: Sequence[int], progress: Progress) -> list[Found]:
        """Return what is found for each budget, the largest first: the way to a small one passes all larger ones.

        A budget is at least one level for every entry.
        """
        shape = self.bases.shape[:3]
        levels = torch.full(shape, self.levels)
        budgets = sorted(budgets, reverse=True)
        step = max(1, math.prod(shape) // 20)
        replay = LayerReplay(self.model, self.projectors)
        self.bases = self.bases.to(next(self.model.parameters()).device)
        found = []
        most = math.prod(shape) * (self.levels + 1) - budgets[-1]
        progress.start("searching", most, most, "trials")
        with torch.no_grad():
            set_bases(self.projectors, None)
            self._learn_from(self.model(**self._inputs(), use_cache=False).logits)
            costs: dict[tuple[int, ...], float] = {}
            changed = [tuple(index) for index in torch.ones(shape).nonzero().tolist()]
            while True:
                set_bases(self.projectors, self.bases, levels * self._unit)
                self._divergence = self._divergence_of(replay.record(self._inputs()))
                total = int(levels.sum())
                if total in budgets:
                    found.append(Found(levels.clone(), self._divergence))
                left = next((total - budget for budget in budgets if budget < total), 0)
                if not left:
                    break
                costs |= self._costs([e for e in changed if levels[e] > 1], levels, replay, progress)
                lowest = sorted((e for e in costs if levels[e] > 1), key=lambda e: (costs[e], e))
                changed = lowest[: min(step, left)]  # near the least budget, fewer may be left to lower
                for entry in changed:
                    levels[entry] -= 1
            set_bases(self.projectors, None)
        return found

    @property
    def _unit(self) -> int:
        return self.bases.shape[-1] // self.levels

    def _costs(
        self, entries: Sequence[tuple[int, ...]], levels: Tensor, replay: LayerReplay, progress: Progress
    ) -> dict[tuple[int, ...], float]:
        """Return how much the divergence grows when each entry alone is lowered by one level."""
        found = {}
        by_layer: dict[int, list[tuple[int, ...]]] = {}
        for entry in entries:
            by_layer.setdefault(entry[0], []).append(entry)
        windows = len(self.windows)
        for layer, inside in by_layer.items():
            for first in range(0, len(inside), self.batch):
                group = inside[first : first + self.batch]
                trial = levels[layer].repeat(len(group), 1, 1)
                for place, (_, kind, head) in enumerate(group):
                    trial[place, kind, head] -= 1
                projector = self.projectors[layer]
                before = projector.key, projector.value
                both = projections(self.bases[layer], trial * self._unit).repeat_interleave(windows, 0)
                projector.key, projector.value = both[:, 0], both[:, 1]
                started = time.perf_counter()
                logits = replay.run(layer, len(group))
                projector.key, projector.value = before
                for entry, part in zip(group, logits.split(windows), strict=True):
                    found[entry] = self._divergence_of(part) - self._divergence
                    self.trials += 1
                    progress.note(f"KL {self._divergence:.4f}")
                    progress.advance(1)
                self.trial_seconds += time.perf_counter() - started
        return found

    def _inputs(self) -> dict[str, Any]:
        """Return what the model's forward takes; logits are wanted of the second half of each window only.

        Tokens there have seen some text, and the output layer of a small model costs as much as a third of the rest.
        """
        inputs = {name: x.to(self.bases.device) for name, x in self.windows.inputs.items()}
        return {**inputs, "logits_to_keep": self._scored}

    @property
    def _scored(self) -> int:
        return -(-self.windows.ids.shape[1] // 2)

    def _learn_from(self, logits: Tensor) -> None:
        """Keep the dense model's probabilities, and what of the divergence does not depend on the student."""
        counted = self.windows.labels[:, -self._scored :].to(logits.device) != -100
        log = logits.float().log_softmax(-1)
        self._teacher = log.exp() * counted[..., None]
        if not bool(counted.any()):
            raise InputError(
                "no token in the second halves of the search's windows counts",
                file=self.windows.name,
                remedy="give text with --calibration, or --search spectrum",
            )
        self._counted = counted
        self._negentropy = float((self._teacher * log).sum(dtype=torch.float64))

    def _divergence_of(self, logits: Tensor) -> float:
        """Return the mean KL(dense ‖ student) of logits [windows, tokens, vocabulary].

        Σ p log p − Σ p (z − log Σ eᶻ): one product and one sum over the vocabulary, and nothing of its size is kept.
        """
        total = torch.tensor(self._negentropy, dtype=torch.float64)
        for p, z, keep in zip(self._teacher, logits, self._counted, strict=True):
            z = z.float()
            total += torch.where(keep, z.logsumexp(-1), 0).sum(dtype=torch.float64).cpu()
            total -= torch.einsum("tv,tv->t", p, z).sum(dtype=torch.float64).cpu()
        return float(total) / int(self._counted.sum())


class LayerReplay:
    """Runs a decoder from one of its layers on, from hidden states of an earlier forward.

    The layers before it are replaced by ones that pass on what they get, and the hidden states go in as embeddings: so
    no architecture's forward is written again here. Where that does not give the model's own logits (a model that does
    something to its embeddings), every trial runs the whole model.
    """

    def __init__(self, model: Any, projectors: Sequence[nn.Module]) -> None:
        self.model = model
        self.layers = _decoder_layers(model, projectors[0])
        self._inputs: list[Tensor] = []
        self._kwargs: dict[str, Any] = {}
        self._exact: bool | None = None

    def record(self, inputs: dict[str, Any]) -> Tensor:
        """Run the whole model, keep what goes into each layer, and return the logits."""
        self._inputs, self._kwargs = [], inputs

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._inputs.append(args[0] if args else kwargs["hidden_states"])

        hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in self.layers]
        try:
            logits: Tensor = self.model(**inputs, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        if self._exact is None:
            last = len(self.layers) - 1
            self._exact = True
            self._exact = bool(torch.allclose(self.run(last, 1), logits, rtol=1e-3, atol=1e-3))
        return logits

    def run(self, layer: int, copies: int) -> Tensor:
        """Return the logits of so many copies of the recorded batch, computed from `layer` on."""
        rest = {
            name: x.repeat(copies, 1) if isinstance(x, Tensor) else x
            for name, x in self._kwargs.items()
            if name != "input_ids"
        }
        if not self._exact:
            ids = self._kwargs["input_ids"].repeat(copies, 1)
            logits: Tensor = self.model(input_ids=ids, **rest, use_cache=False).logits
            return logits
        hidden = self._inputs[layer].repeat(copies, 1, 1)
        with self._skipping(layer):
            tail: Tensor = self.model(inputs_embeds=hidden, **rest, use_cache=False).logits
            return tail

    @contextmanager
    def _skipping(self, count: int) -> Iterator[None]:
        whole = list(self.layers)
        try:
            for place in range(count):
                self.layers[place] = _Skip(whole[place])
            yield
        finally:
            for place in range(count):
                self.layers[place] = whole[place]


class _Skip(nn.Module):
    """A decoder layer that returns what it gets, and answers for the layer that it stands for."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_layer", layer)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def _decoder_layers(model: Any, projector: nn.Module) -> nn.ModuleList:
    """Return the list of layers that holds the attention module with this projector."""
    names = {module: name for name, module in model.named_modules()}
    path = names[projector].split(".")
    for end in range(len(path), 0, -1):
        parent = model.get_submodule(".".join(path[:end]))
        if isinstance(parent, nn.ModuleList):
            return parent
    raise RuntimeError("the model's layers are in no list")
