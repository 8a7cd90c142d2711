"""How two checkpoints differ, tensor by tensor, in bounded memory."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from basiscli.checkpoints.adapter import Adapter
from basiscli.checkpoints.adapter_view import Model
from basiscli.checkpoints.views import Checkpoint, row_blocks
from basiscli.errors import UsageError
from basiscli.hub.resolve import resolve, resolve_base
from basiscli.model.adapted import adapted
from basiscli.names import natural_key
from basiscli.progress import Progress, Silent

_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class TensorDifference:
    """The difference of one tensor between models A and B. Norms are Frobenius norms in float64."""

    name: str
    equal: bool
    """Whether every element is the same number."""
    norm_a: float
    norm_b: float
    distance: float
    """‖A − B‖."""
    largest: float
    """The largest absolute difference of an element."""
    cosine: float
    """Of A and B as vectors; 1 where both are zero."""

    @property
    def relative(self) -> float:
        """‖A − B‖ / ‖A‖."""
        return _ratio(self.distance, self.norm_a)


@dataclass(frozen=True)
class Differences:
    """The differences between two models."""

    tensors: list[TensorDifference]
    """Of common tensors with equal shapes, in natural order."""
    only_in_a: list[str]
    only_in_b: list[str]
    shapes_differ: dict[str, str]
    """Both shapes as text, by name."""

    @property
    def relative(self) -> float:
        """‖A − B‖ / ‖A‖ over all common tensors."""
        return _ratio(math.hypot(*(t.distance for t in self.tensors)), math.hypot(*(t.norm_a for t in self.tensors)))

    @property
    def identical(self) -> bool:
        """Whether both have the same tensors with the same numbers."""
        return not (self.only_in_a or self.only_in_b or self.shapes_differ) and all(t.equal for t in self.tensors)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, for `--json`."""
        tensors = [asdict(t) | {"relative": t.relative} for t in self.tensors]
        return asdict(self) | {"identical": self.identical, "relative": self.relative, "tensors": tensors}


def diff(
    a: str | Path, b: str | Path, *, base: str | Path | None = None, progress: Progress | None = None
) -> Differences:
    """Return the differences between two models, read in blocks.

    Args:
        a: folder, weights file, Hub id or LoRA adapter (read as its base plus its update).
        b: the model to compare it with.
        base: the base of adapters; by default the one they name.
        progress: a progress display; none by default.

    Raises:
        UsageError, InputError, HubError: a model is missing or damaged, or an adapter names no base.
    """
    first, second = (_open(str(model), None if base is None else str(base)) for model in (a, b))
    show = progress or Silent()
    common = sorted(first.tensors.keys() & second.tensors.keys(), key=natural_key)
    same_shape = [name for name in common if first.tensors[name].shape == second.tensors[name].shape]
    show.start("diff", len(same_shape), sum(first.tensors[name].nbytes for name in same_shape))
    differences = []
    try:
        for name in same_shape:
            differences.append(_compare(first, second, name))
            show.advance(first.tensors[name].nbytes)
    finally:
        show.stop()
        first.close()
        second.close()
    return Differences(
        differences,
        sorted(first.tensors.keys() - second.tensors.keys(), key=natural_key),
        sorted(second.tensors.keys() - first.tensors.keys(), key=natural_key),
        {
            name: f"{list(first.tensors[name].shape)} and {list(second.tensors[name].shape)}"
            for name in common
            if name not in set(same_shape)
        },
    )


def _open(spec: str, base: str | None) -> Model:
    source = resolve(spec)
    if not source.is_adapter:
        return Checkpoint.open(source)
    if base is None and source.base_model is None:
        raise UsageError(f"{spec} is an adapter that names no base", remedy="give it with --base")
    base_source = resolve(base) if base is not None else resolve_base(source.base_model or "", source)
    return adapted(Adapter(source), Checkpoint.open(base_source))


def _compare(a: Model, b: Model, name: str) -> TensorDifference:
    import torch

    from basiscli.linalg.lowrank import gram

    total = torch.zeros(3, 3, dtype=torch.float64)
    largest, equal = 0.0, True
    for rows in row_blocks(a.tensors[name].shape, _BLOCK_ELEMENTS):
        x, y = a.read(name, rows), b.read(name, rows)
        equal = equal and bool(torch.equal(x, y) if x.dtype == y.dtype else torch.equal(x.double(), y.double()))
        x, y = x.double().reshape(-1), y.double().reshape(-1)
        if x.numel():
            difference = x - y
            largest = max(largest, float(difference.abs().max()))
            total += gram([x, y, difference])
    norm_a, norm_b, distance = (math.sqrt(max(float(total[i, i]), 0.0)) for i in range(3))
    cosine = float(total[0, 1]) / (norm_a * norm_b) if norm_a and norm_b else float(norm_a == norm_b)
    return TensorDifference(name, equal, norm_a, norm_b, distance, largest, cosine)


def _ratio(x: float, y: float) -> float:
    if y == 0:
        return 0.0 if x == 0 else math.inf
    return x / y
