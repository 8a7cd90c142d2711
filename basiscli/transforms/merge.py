"""What a merge is given and what it returns: functions of tensors, and `TaskVectorMerge` for two passes.

A merge function may ask for `base` (float32 tensor; with a default of None it can do without), `others` (list of
float32 tensors of base's shape), `weights` (one float a model) and `seed` (an integer that depends on `--seed` and the
tensor's name only). It returns a tensor of the same shape and leaves its inputs as they are. `elementwise=True` says
that every output element depends on the input elements at its index alone: the core then passes blocks of rows instead
of whole tensors, and `start` is the flat index of a block's first element. `rowwise=True` says the same of rows (all
that has one index in the first dimension; a tensor of one dimension is one row).

Where a method needs a few numbers of the whole tensor as well (a threshold, norms, inner products), `measure=` names a
function that finds them from `blocks`, which can be gone over as often as it takes, and from parameters it names by
keyword; what it returns is `measured`. A tensor of any size is then merged within a few blocks' memory:

    def largest(blocks):
        return max(float(v.abs().max()) for block in blocks for v in block.task_vectors)

    @transform("merge", elementwise=True, measure=largest, source="…")
    def clipped(base, others, measured, *, share: float = 0.5):
        \"\"\"Average of task vectors, each clipped to a share of the largest change in the tensor.\"\"\"
        limit = share * measured
        return base + sum((x - base).clamp(-limit, limit) for x in others) / len(others)

Parameters of type `PerModel[…]` take one number or a list with one a model. `models=(fewest, most)` says how many a
method merges, and `check=` names a function that refuses combinations of parameters before anything is read. With
`onto_weight=` an earlier merge can be continued: its result is then the first of `others`, its weight the first of
`weights`, and `earlier` the number of models in it (else 0).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

from basiscli.transforms.kind import Kind
from basiscli.transforms.parameters import Parameters

if TYPE_CHECKING:
    from torch import Tensor

    from basiscli.linalg.lowrank import LowRank


@dataclass(frozen=True)
class History:
    """What an earlier merge recorded so that it can be continued with `--onto`."""

    method: str
    parameters: Mapping[str, Any]
    weights: list[float]
    numbers: Mapping[str, float]

    @property
    def models(self) -> int:
        """How many models the earlier merge had, those that it continued itself included."""
        return int(self.numbers.get("models", len(self.weights)))


OntoWeight = Callable[[History], float]
"""Returns the weight that an earlier merge's result takes as the first model."""


@dataclass(frozen=True)
class Choices:
    """What the user chose for a merge, for a method's `check`."""

    method: str
    values: Mapping[str, Any]
    """The parameters by name."""
    weights: list[float]
    history: History | None
    """Of the earlier merge that is continued."""


Check = Callable[[Choices], None]
"""Raises UsageError for choices that make no sense together."""


@dataclass(frozen=True)
class Block:
    """Some rows of one tensor of all models, float32 (float64 if any model stores it), on the run's device."""

    rows: slice | None
    """None for all of it."""
    start: int
    """Index of the first element in the flattened tensor."""
    base: Tensor | None
    others: list[Tensor]

    @property
    def task_vectors(self) -> list[Tensor]:
        """Fine-tuned − base of each model, as new tensors; for methods that need a base."""
        assert self.base is not None
        return [other - self.base for other in self.others]


@dataclass(frozen=True)
class Blocks:
    """One tensor of all models as an iterable of blocks of rows; every iteration reads the whole tensor again."""

    shape: tuple[int, ...]
    read: Callable[[], Iterator[Block]]

    def __iter__(self) -> Iterator[Block]:
        return self.read()

    @property
    def count(self) -> int:
        """Number of elements of the tensor."""
        return math.prod(self.shape)

    def without_base(self) -> Blocks:
        """Return the same blocks for a method that has no use for a base, given or not."""
        return Blocks(self.shape, lambda: (replace(block, base=None) for block in self))


@dataclass(frozen=True)
class TaskVectors:
    """The task vectors (fine-tuned − base) of one tensor, in the order the models were given.

    Iterating reads one at a time: a dense float32 tensor, or the factors of a LoRA update. Models that leave the tensor
    as it is are skipped. When an earlier merge is continued, its running sum comes first.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    weight_norm: float
    """Frobenius norm of the base's tensor where task vectors come dense, else 0: their rounding is relative to it."""
    read: Callable[[], Iterator[Tensor | LowRank]]

    def __iter__(self) -> Iterator[Tensor | LowRank]:
        return self.read()


@dataclass(frozen=True)
class Norms:
    """Frobenius norms over the whole model, every parameter counted once."""

    task_vectors: list[float]
    """Of each new model, in order."""
    merged: float
    """Of the merged task vector."""
    history: History | None


class TaskVectorMerge(ABC):
    """A merge that adds one merged task vector to the base: `W = W_base + scale · S`, scale one number for all tensors.

    The core calls `merge` once a tensor (in any order, in threads), sums the norms, calls `scale` once, and finishes
    the tensors in a second pass that only adds.
    """

    Parameters: ClassVar[type[BaseModel]] = Parameters

    def __init__(self, parameters: Any) -> None:
        self.parameters = parameters

    @abstractmethod
    def merge(self, task_vectors: TaskVectors) -> tuple[Tensor | LowRank | None, dict[str, Any]]:
        """Return the merged task vector S of one tensor (None for zero), and details of it for the report, by name."""

    @abstractmethod
    def scale(self, norms: Norms) -> dict[str, float]:
        """Return numbers of the whole merge by name, for the report; the one named 'scale' multiplies S."""

    def elementwise(self, kind: Kind) -> bool:
        """Return whether each element of S depends only on the task vectors' elements at its index.

        Dense tensors of such kinds come in blocks of rows, and the details that `merge` returns with S are not kept.
        """
        return False

    @staticmethod
    def onto_weight(history: History) -> float:
        """Return the factor that turns an earlier result's task vector back into its S: 1 / scale by default."""
        return 1.0 / history.numbers["scale"]
