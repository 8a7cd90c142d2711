"""Training the bases of a KV cache by distillation from the model itself."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from basiscli.calibration.tokens import Windows
from basiscli.checkpoints.header import TensorSpec
from basiscli.checkpoints.scratch import write_file
from basiscli.checkpoints.source import Source
from basiscli.checkpoints.views import Checkpoint
from basiscli.commands.kv.attention import Projector, set_bases
from basiscli.commands.kv.loss import loss_and_gradient
from basiscli.errors import BasisError, InputError
from basiscli.linalg.orthogonal import nearest_orthogonal
from basiscli.progress import Progress
from basiscli.transforms import KVCompression

_STATE = ("start", "free", "mean", "square")


@dataclass
class Training:
    """Trains the bases of all layers and heads by AdamW; the model's weights are not changed.

    The windows of a step, the ranks it draws and its learning rate depend on the seed and the step's number alone, so
    a run that was interrupted and goes on from its last saved state gives the same bases.
    """

    model: Any
    projectors: Sequence[Projector]
    """The attention functions of its layers."""
    method: KVCompression
    start: Tensor
    """Bases to begin with, float32 [layers, 2, KV heads, d, d]."""
    windows: Windows
    steps: int
    batch: int
    """Windows per step."""
    levels: int
    seed: int
    state_file: Path
    """Holds the optimiser's state, from which an interrupted run goes on."""
    save_seconds: float = 60.0
    """Seconds between two saves."""
    losses: list[float] = field(default_factory=list)
    """One per step."""

    def run(self, progress: Progress) -> Tensor:
        """Train and return the bases, float32 [layers, 2, KV heads, d, d] on the CPU.

        Raises:
            InputError: the loss becomes NaN or Inf.
        """
        free = torch.zeros_like(self.start).requires_grad_(True)
        optimiser = torch.optim.AdamW([free], lr=1.0, betas=(0.9, 0.999), weight_decay=0.0)
        first = self._load(free, optimiser)
        size = self.batch * self.windows.ids.shape[1]
        progress.start("training", self.steps - first, (self.steps - first) * size, "tokens")
        saved = time.monotonic()
        try:
            for step in range(first, self.steps):
                self._step(step, free, optimiser)
                progress.note(f"loss {sum(self.losses[-20:]) / len(self.losses[-20:]):.3f}")
                progress.advance(size)
                if time.monotonic() - saved > self.save_seconds:
                    self._save(step + 1, free, optimiser)
                    saved = time.monotonic()
        finally:
            set_bases(self.projectors, None)
        self._save(self.steps, free, optimiser)
        if not bool(torch.isfinite(free).all()):
            raise _lost("the bases are not numbers after the last training step")
        with torch.no_grad():
            # Rounding of the Cayley map's solve (1e-6) is taken out, so that what is stored is orthogonal to float32.
            return nearest_orthogonal(self.method.turned(self.start, free)).float().cpu()

    def _step(self, step: int, free: Tensor, optimiser: torch.optim.Optimizer) -> None:
        device = self.start.device
        generator = _generator(self.seed * 1_000_003 + step)
        ranks = self.method.draw(tuple(self.start.shape[:3]), self.levels, generator)
        batch = self.windows.select(self._window_indices(step))
        inputs = {name: x.to(device) for name, x in batch.inputs.items()}
        with torch.no_grad():
            set_bases(self.projectors, None)
            teacher = self.model(**inputs, use_cache=False).logits
        set_bases(self.projectors, self.method.turned(self.start, free), ranks * (self.start.shape[-1] // self.levels))
        student = self.model(**inputs, use_cache=False).logits
        loss, gradient = loss_and_gradient(self.method, student.detach(), teacher, batch.labels.to(device))
        if not math.isfinite(loss):
            raise _lost(f"the loss of training step {step} is {loss}")
        optimiser.zero_grad()
        student.backward(gradient)
        torch.nn.utils.clip_grad_norm_([free], 1.0)
        for group in optimiser.param_groups:
            group["lr"] = self.method.learning_rate(step, self.steps)
        optimiser.step()
        self.losses.append(loss)

    def _window_indices(self, step: int) -> Tensor:
        """Return which windows a step takes: every epoch goes through all in an order of its own."""
        numbers = torch.arange(step * self.batch, (step + 1) * self.batch)
        indices = []
        for number in numbers.tolist():
            epoch, index = divmod(number, len(self.windows))
            if not self._orders or self._orders[0] != epoch:
                shuffled = torch.randperm(len(self.windows), generator=_generator(self.seed + epoch))
                self._orders = (epoch, shuffled)
            indices.append(self._orders[1][index])
        return torch.stack(indices)

    _orders: tuple[int, Tensor] | None = None

    def _save(self, step: int, free: Tensor, optimiser: torch.optim.Optimizer) -> None:
        state = optimiser.state[free]
        # The start, too: computed again with another number of threads it would differ in the last bits.
        tensors = [self.start, free.detach(), state["exp_avg"], state["exp_avg_sq"]]
        specs = [TensorSpec(name, "F32", tuple(x.shape)) for name, x in zip(_STATE, tensors, strict=True)]
        specs += [TensorSpec("step", "I64", (1,)), TensorSpec("losses", "F64", (len(self.losses),))]
        tensors += [torch.tensor([step]), torch.tensor(self.losses, dtype=torch.float64)]
        write_file(self.state_file, specs, tensors)

    def _load(self, free: Tensor, optimiser: torch.optim.Optimizer) -> int:
        """Take up a saved state; return the step to go on with."""
        if not self.state_file.is_file():
            return 0
        try:
            with closing(Checkpoint.open(Source("state", self.state_file))) as stored:
                tensors = {name: stored.read(name) for name in stored.tensors}
        except BasisError:
            return 0  # the machine went down while it was written
        self.start = tensors["start"].to(self.start.device)
        with torch.no_grad():
            free.copy_(tensors["free"])
        step = int(tensors["step"])
        optimiser.state[free] = {
            "step": torch.tensor(float(step)),
            "exp_avg": tensors["mean"].to(free.device),
            "exp_avg_sq": tensors["square"].to(free.device),
        }
        self.losses = tensors["losses"].tolist()
        return step


def _lost(what: str) -> InputError:
    return InputError(what, remedy="a lower -p learning_rate, or check the model with `basis eval`")


def _generator(seed: int) -> torch.Generator:
    """Return a generator for a seed of any size."""
    return torch.Generator().manual_seed(seed % (1 << 63))
