"""Distillation of a LoRA adapter into a NOLA adapter of the same base by their logits, and its measurement."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from basiscli.calibration.tokens import Windows
from basiscli.linalg.lowrank import LowRank
from basiscli.progress import Progress

_ROWS = 64  # tokens whose logits are compared at a time: a vocabulary of 50,000 is large


@dataclass(frozen=True)
class Fidelity:
    """How close a NOLA adapter is to the LoRA that it was made from, on held-out windows."""

    kl: float
    """Mean over tokens of KL(LoRA ‖ NOLA), in nats."""
    kl_base: float
    """KL(LoRA ‖ base) in nats: the effect of the LoRA."""
    perplexity: float
    """With the NOLA adapter."""
    perplexity_lora: float
    perplexity_base: float
    tokens: int
    """Counted tokens."""

    @property
    def share(self) -> float:
        """1 − KL(LoRA ‖ NOLA) / KL(LoRA ‖ base): 1 for the same logits, 0 for those of the base."""
        return 1 - self.kl / self.kl_base if self.kl_base > 0 else 1.0


@dataclass
class Distillation:
    """A base with a NOLA adapter on it (the student), and a LoRA that can be switched on in its place (the teacher)."""

    model: Any
    """The PEFT model, its NOLA adapter active."""
    updates: Mapping[str, LowRank]
    """s·B·A of the LoRA by the loaded base's modules, [out, in]."""
    device: torch.device
    losses: list[float] = field(default_factory=list)
    _teaching: bool = False

    def __post_init__(self) -> None:
        inner = self.model.get_base_model()
        for name, update in self.updates.items():
            layer = inner.get_submodule(name)
            linear = layer.get_base_layer()
            linear.register_forward_hook(
                self._added(LowRank(update.b.to(linear.weight), update.a.to(linear.weight), update.shape))
            )

    def train(self, windows: Windows, *, steps: int, batch: int, rate: float, seed: int, progress: Progress) -> None:
        """Minimise KL(LoRA ‖ NOLA) over windows in a random order, by AdamW with warm-up and a cosine schedule.

        Args:
            windows: the text to learn from.
            steps: of the optimiser.
            batch: windows per step.
            rate: learning rate, as a share of the root mean square of a module's coefficients.
            seed: of the order.
            progress: the display; counts tokens.
        """
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        # A step moves every module's coefficients by the same share of their size.
        groups = [{"params": [p], "lr": rate * (float(p.detach().square().mean().sqrt()) or 1.0)} for p in parameters]
        optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
        warm = max(1, steps // 20)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda s: min((s + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * s / steps))
        )
        progress.start("distilling", steps, steps * batch * windows.ids.shape[1], "tokens")
        for indices in _drawn(len(windows), steps, batch, seed):
            part = windows.select(indices)
            inputs, labels = self._inputs(part), part.labels.to(self.device)
            teacher = self._teacher(inputs)
            with torch.enable_grad():
                student = self.model(**inputs, use_cache=False).logits
                loss, gradient = _loss(student.detach(), teacher, labels)
                del teacher
                student.backward(gradient)
            del student, gradient
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
            self.losses.append(loss)
            progress.advance(part.ids.numel())

    @torch.no_grad()
    def measure(self, windows: Windows, progress: Progress) -> Fidelity:
        """Return the divergences and perplexities of base, LoRA and NOLA adapter on these windows."""
        sums = torch.zeros(5, dtype=torch.float64)
        progress.start("measuring", len(windows), 3 * windows.ids.numel(), "tokens")
        tokens = 0
        for index in range(len(windows)):
            part = windows.select([index])
            inputs, labels = self._inputs(part), part.labels.to(self.device)
            rows = (labels.flatten() != -100).nonzero().squeeze(1)
            tokens += len(rows)
            found = [self._teacher(inputs), self._base(inputs), self.model(**inputs, use_cache=False).logits]
            for some in rows.split(_ROWS):
                lora, *others = (x.flatten(0, 1)[some].float().log_softmax(-1) for x in found)
                wanted = labels.flatten()[some][:, None]
                sums[:2] += torch.stack([(lora.exp() * (lora - log)).sum() for log in others]).double().cpu()
                nll = [-log.gather(-1, wanted).sum() for log in (lora, *others)]
                sums[2:] += torch.stack(nll).double().cpu()
            progress.advance(3 * part.ids.numel())
        kl_base, kl, lora, base, nola = (sums / max(1, tokens)).tolist()
        of_nola, of_lora, of_base = (math.exp(min(nll, 700)) for nll in (nola, lora, base))
        return Fidelity(max(0.0, kl), max(0.0, kl_base), of_nola, of_lora, of_base, tokens)

    def _inputs(self, part: Windows) -> dict[str, Tensor]:
        return {name: x.to(self.device) for name, x in part.inputs.items()}

    def _base(self, inputs: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad(), self.model.disable_adapter():
            logits: Tensor = self.model(**inputs, use_cache=False).logits
        return logits

    def _teacher(self, inputs: Mapping[str, Tensor]) -> Tensor:
        with self._as_teacher():
            return self._base(inputs)

    @contextmanager
    def _as_teacher(self) -> Iterator[None]:
        self._teaching = True
        try:
            yield
        finally:
            self._teaching = False

    def _added(self, update: LowRank) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            return output + (args[0] @ update.a.mT) @ update.b.mT if self._teaching else None

        return add


def _loss(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """Return the mean of KL(teacher ‖ student) over counted tokens, and its gradient by the student's logits."""
    gradient, flat = torch.zeros_like(student), student.flatten(0, 1)
    rows = (labels.flatten() != -100).nonzero().squeeze(1)
    total = 0.0
    for some in rows.split(_ROWS):
        log_q, log_p = (x[some].float().log_softmax(-1) for x in (flat, teacher.flatten(0, 1)))
        total += float((log_p.exp() * (log_p - log_q)).sum())
        gradient.flatten(0, 1)[some] = ((log_q.exp() - log_p.exp()) / len(rows)).to(gradient.dtype)
    return total / max(1, len(rows)), gradient


def _drawn(count: int, steps: int, batch: int, seed: int) -> Iterator[list[int]]:
    """Yield the windows of each step: all of them in a random order, then again in another."""
    generator = torch.Generator().manual_seed(seed)
    left: list[int] = []
    for _ in range(steps):
        while len(left) < batch:
            left += torch.randperm(count, generator=generator).tolist()
        yield left[:batch]
        left = left[batch:]
