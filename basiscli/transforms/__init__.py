"""The contract between a transform and the core, and the decorator that makes one.

A transform is mathematics on named tensors. It never opens a file, chooses a device or prints. The simplest is a
function whose positional parameters say what it wants and whose keyword-only ones are its parameters:

    @transform("merge", elementwise=True, source="…")
    def mean(base, others, *, keep_base: bool = True):
        \"\"\"Plain average.\"\"\"
        models = [base, *others] if keep_base else others
        return sum(models) / len(models)

A merge may ask for `base` (float32 tensor; with a default of None it can do without), `others` (list of float32
tensors of base's shape), `weights` (one float a model) and `seed` (an integer that depends on `--seed` and the
tensor's name only). It returns a tensor of the same shape and leaves its inputs as they are. `elementwise=True` says
that every output element depends on the input elements at its place alone: the core then passes blocks of rows instead
of whole tensors, and `start` is the place of a block's first element in the flat tensor. `rowwise=True` says the same
of rows (all that has one index in the first dimension; a tensor of one dimension is one row).

Where a method needs a few numbers of the whole tensor as well (a threshold, norms, inner products), `measure=` names a
function that finds them from `blocks`, which can be gone over as often as it takes, and from parameters it names by
keyword; what it returns is `measured`. A tensor of any size is then merged within a few blocks' memory.

Parameters of type `PerModel[…]` take one number or a list with one a model. `models=(fewest, most)` says how many a
method merges, and `check=` names a function that refuses combinations of parameters before anything is read. With
`onto_weight=` an earlier merge can be continued: its result is then the first of `others`, its weight the first of
`weights`, and `earlier` the number of models in it (else 0).

An init takes `weight` (float32 [out, in]), `rank`, and `svd` (how to decompose: `svd.top(weight, rank)`), and returns
(B [out, rank], A [rank, in]): the part of the weight that moves into the adapter. Scaling and residual are the core's.
With `trains="values"` it returns (B, σ [rank], A), of which only σ is trained. `principal=True` allows `--quantize`.
With `trains="coefficients"` it takes `random` (the `RandomBases` of A and of B, as many as its parameter `bases` says)
and returns a coefficient for each; ΔW must be 0, as the base stays as it is.
One that also asks for `inputs` (`InputMoments` of what the weight is multiplied with) needs calibration text.

A method that needs one number over the whole model is a class derived from `TaskVectorMerge`; one that takes an
adapter's A from calibration data and shares out ranks is derived from `DataInit`; one that finds bases for a KV cache
from `KVCompression`.

This module imports no torch, and a transform should not at its top either: `--dry-run` then answers at once.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from basiscli.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from basiscli.linalg.lowrank import LowRank
    from basiscli.linalg.svd import SVD

Family = Literal["merge", "init", "compress"]
Trained = Literal["factors", "values", "coefficients"]
_POSITIONAL: dict[Family, tuple[str, ...]] = {
    "merge": ("base", "others", "weights", "seed", "start", "measured", "earlier"),
    "init": ("weight", "rank", "svd", "inputs", "random"),
    "compress": (),
}
_MEASURE = ("blocks", "weights", "seed", "earlier")
Target = TypeVar("Target")


class Parameters(BaseModel):
    """Parameters of a method: unknown names and values out of range are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


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


@dataclass(frozen=True)
class Block:
    """Some rows of one tensor of all models, float32 (float64 if any model stores it), on the run's device."""

    rows: slice | None
    """None for all of it."""
    start: int
    """The place of the first element in the flat tensor."""
    base: Tensor | None
    others: list[Tensor]

    @property
    def task_vectors(self) -> list[Tensor]:
        """The models' differences from the base, new tensors; for methods that need a base."""
        assert self.base is not None
        return [other - self.base for other in self.others]


@dataclass(frozen=True)
class Blocks:
    """One tensor of all models in blocks of rows, in order; every iteration goes over the whole tensor again."""

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
class Choices:
    """What the user chose for a merge, for a method's `check`."""

    method: str
    values: Mapping[str, Any]
    """The parameters by name."""
    weights: list[float]
    history: History | None
    """Of the earlier merge that is continued."""


Check = Callable[[Choices], None]


@dataclass(frozen=True)
class Method:
    """A transform as the registry knows it."""

    family: Family
    name: str
    doc: str
    source: str
    parameters: type[BaseModel]
    implementation: Any
    elementwise: bool = False
    onto_weight: OntoWeight | None = None
    wants: tuple[str, ...] = ()
    needs_base: bool = True
    rowwise: bool = False
    models: tuple[int, int | None] = (1, None)
    """merge: the fewest and the most models, the base not counted."""
    measure: Callable[..., Any] | None = None
    check: Check | None = None
    principal: bool = False
    """init: whether the factors are the weight's leading part, which a little noise leaves where it is."""
    trains: Trained = "factors"
    """init: A and B of ΔW = s·B·A, the values σ of ΔW = B diag(σ) A alone, or coefficients of random A and B."""

    @property
    def summary(self) -> str:
        """The first line of the documentation."""
        return self.doc.partition("\n")[0]

    @property
    def keeps_factors(self) -> bool:
        """Whether low-rank inputs give a low-rank result that can be written as an adapter."""
        return isinstance(self.implementation, type) and issubclass(self.implementation, TaskVectorMerge)

    @property
    def shares_ranks(self) -> bool:
        """Whether modules get different ranks, which only the data tells; B is zero then, and the base unchanged."""
        return isinstance(self.implementation, type) and issubclass(self.implementation, DataInit)

    @property
    def needs_calibration(self) -> bool:
        """Whether an init needs the inputs of the weights."""
        return self.shares_ranks or "inputs" in self.wants

    def validate(self, given: Mapping[str, Any]) -> BaseModel:
        """Check parameters given by name.

        Raises:
            UsageError: an unknown name (with the nearest known one), a wrong type or a value out of range.
        """
        known = self.parameters.model_fields
        for name in given:
            if name not in known:
                raise UsageError(f"{self.name} has no parameter '{name}'", remedy=did_you_mean(name, known))
        try:
            return self.parameters.model_validate(dict(given))
        except ValidationError as error:
            first = error.errors()[0]
            # Between them pydantic says which form of a PerModel it took; the numbers of a list count from 0.
            where = ".".join(str(part) for part in first["loc"] if part in known or isinstance(part, int))
            raise UsageError(
                f"parameter {where}={first['input']!r} of {self.name}: {first['msg']}",
                remedy=f"`basis methods show {self.name}` lists its parameters",
            ) from error

    def call(self, values: BaseModel, available: Mapping[str, Any]) -> Tensor:
        """Call a function transform with what it wants of the available inputs and its parameters."""
        positional = {name: available[name] for name in self.wants}
        keyword = {_python_name(name): value for name, value in values}
        result: Tensor = self.implementation(**positional, **keyword)
        return result

    def find_numbers(self, values: BaseModel, available: Mapping[str, Any]) -> Any:
        """Call `measure`, if there is one, with what it asks for by name: inputs of the core's and parameters."""
        if self.measure is None:
            return None
        known = {**{_python_name(name): value for name, value in values}, **available}
        return self.measure(**{name: known[name] for name in inspect.signature(self.measure).parameters})


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
        """Return S for one tensor (None for zero) and what the report should say about it."""

    @abstractmethod
    def scale(self, norms: Norms) -> dict[str, float]:
        """Return the numbers of the whole merge; the one named 'scale' multiplies S."""

    def elementwise(self, kind: Kind) -> bool:
        """Return whether each element of S depends only on the task vectors' elements at its place.

        Dense tensors of such kinds come in blocks of rows, and what `merge` says about them is not kept.
        """
        return False

    @staticmethod
    def onto_weight(history: History) -> float:
        """Return what multiplies an earlier result's task vector to give back its S."""
        return 1.0 / history.numbers["scale"]


@dataclass(frozen=True)
class AttentionMoments:
    """Second moments XᵀX over the calibration tokens, one matrix a layer and KV head: float64 [layers, heads, d, d]."""

    keys: Tensor
    """Of the keys as they are cached, after RoPE."""
    values: Tensor
    queries: Tensor
    """Of the queries after RoPE, summed over the query heads that share the KV head."""
    outputs: Tensor
    """W_oᵀ W_o over the output projection's columns that read from the KV head: what an error of the value does."""


@dataclass(frozen=True)
class InputMoments:
    """First and second moments of a module's inputs x over the calibration tokens, about a point near their mean."""

    count: int
    """Tokens."""
    shift: Tensor
    """The point c, float64 [in]."""
    total: Tensor
    """Σ (x − c), float64 [in]."""
    second: Tensor
    """Σ (x − c)(x − c)ᵀ, float64 [in, in]: sums of float32 products."""

    @property
    def centred(self) -> Tensor:
        """Σ (x − x̄)(x − x̄)ᵀ, float64 [in, in]."""
        return self.second.addr(self.total, self.total, alpha=-1 / max(1, self.count))

    @property
    def raw(self) -> Tensor:
        """Σ x xᵀ, float64 [in, in]."""
        mixed = self.total[:, None] * self.shift
        return self.second + mixed + mixed.mT + self.count * self.shift[:, None] * self.shift


class DataInit(ABC):
    """An init whose A spans directions of a module's inputs and whose B is zero, and which shares ranks out.

    The core runs the model and gives every module the directions with the highest scores of the whole model: as many
    in all as equal ranks would have.
    """

    Parameters: ClassVar[type[BaseModel]] = Parameters

    def __init__(self, parameters: Any) -> None:
        self.parameters = parameters

    @abstractmethod
    def offered(self, rank: int) -> int:
        """Return how many directions every module offers when the mean rank is to be this."""

    @abstractmethod
    def directions(self, inputs: InputMoments, count: int, svd: SVD) -> tuple[Tensor, Tensor]:
        """Return so many rows for A [count, in], and their scores [count] in falling order; both float64."""


class KVCompression(ABC):
    """A method that finds an orthogonal basis of the keys and one of the values, for each layer and KV head.

    Bases are float32 [layers, 2, KV heads, d, d] (keys first, then values), columns in falling importance. The core
    runs the model; while it trains, `turned(start, free)` are the bases, `free` is what is learned (zeros at first),
    and every step keeps the numbers of columns that `draw` returns.
    """

    Parameters: ClassVar[type[BaseModel]] = Parameters

    def __init__(self, parameters: Any) -> None:
        self.parameters = parameters

    @abstractmethod
    def start(self, moments: AttentionMoments) -> Tensor:
        """Return the bases before training."""

    @abstractmethod
    def turned(self, start: Tensor, free: Tensor) -> Tensor:
        """Return the bases for free parameters of the same shape; those for zeros are the start."""

    @abstractmethod
    def draw(self, shape: tuple[int, ...], levels: int, generator: Generator) -> Tensor:
        """Return how many of `levels` equal steps of columns each basis keeps in one training step (integers)."""

    @abstractmethod
    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of logits [tokens, vocabulary] against the dense model's and the labels [tokens]."""

    @abstractmethod
    def learning_rate(self, step: int, steps: int) -> float:
        """Return AdamW's learning rate at a step, counted from 0."""


def transform(
    family: Family,
    *,
    name: str | None = None,
    source: str = "",
    elementwise: bool = False,
    rowwise: bool = False,
    models: tuple[int, int | None] | None = None,
    measure: Callable[..., Any] | None = None,
    check: Check | None = None,
    onto_weight: OntoWeight | None = None,
    principal: bool = False,
    trains: Trained = "factors",
) -> Callable[[Target], Target]:
    """Make a function, a `TaskVectorMerge`, a `DataInit` or a `KVCompression` class a transform.

    Args:
        family: the command it serves.
        name: the name at the command line; by default the function's own, or the class's in lower case.
        source: paper and equation.
        elementwise: see the module's documentation, as for `rowwise`, `measure` and `check`.
        rowwise: every row of the result depends on the models' rows at its place.
        models: the fewest and the most models a merge takes (None: any number), the base not counted; by default two
            or more, and with a base one or more.
        measure: finds numbers of the whole tensor, the function's `measured`.
        check: raises UsageError for parameters or weights that make no sense together.
        onto_weight: for `--onto`: from an earlier merge's history to the weight its result takes as the first model.
        principal: for `--quantize`: an init that takes the leading part of a matrix, and may be asked again for that of
            what a quantised base lacks.
        trains: what of an init's result is trained: A and B, the values between them alone, or coefficients of random
            bases.
    """

    def register(target: Target) -> Target:
        doc = inspect.getdoc(target) or ""
        if isinstance(target, type) and issubclass(target, KVCompression | DataInit):
            method = Method(family, name or target.__name__.lower(), doc, source, target.Parameters, target)
        elif isinstance(target, type) and issubclass(target, TaskVectorMerge):
            method = Method(
                family, name or target.__name__.lower(), doc, source, target.Parameters, target,
                onto_weight=target.onto_weight,
            )  # fmt: skip
        elif inspect.isfunction(target):
            wants, needs_base = _wants(target, family)
            parameters = _parameters_of(target)
            _check_measure(measure, parameters)
            method = Method(
                family, name or target.__name__, doc, source, parameters, target, elementwise, onto_weight, wants,
                needs_base, rowwise, models or (1 if needs_base else 2, None), measure, check, principal, trains,
            )  # fmt: skip
        else:
            raise TypeError("a transform is a function, or a TaskVectorMerge, DataInit or KVCompression class")
        target.basis_method = method  # type: ignore[attr-defined]
        return target

    return register


def _wants(function: Callable[..., Any], family: Family) -> tuple[tuple[str, ...], bool]:
    """Return the inputs that a function's positional parameters name, and whether it cannot do without a base."""
    positional = [
        p for p in inspect.signature(function).parameters.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY
    ]
    for parameter in positional:
        if parameter.name not in _POSITIONAL[family]:
            known = ", ".join(_POSITIONAL[family]) or "nothing"
            raise TypeError(
                f"{function.__name__}: a {family} function takes {known}, not '{parameter.name}'; "
                "its own parameters are keyword-only"
            )
    needs_base = any(p.name == "base" and p.default is inspect.Parameter.empty for p in positional)
    return tuple(p.name for p in positional), needs_base


def _check_measure(measure: Callable[..., Any] | None, parameters: type[BaseModel]) -> None:
    if measure is None:
        return
    known = {*_MEASURE, *map(_python_name, parameters.model_fields)}
    for asked in inspect.signature(measure).parameters:
        if asked not in known:
            raise TypeError(f"{measure.__name__}: there is no input or parameter '{asked}'")


def _parameters_of(function: Callable[..., Any]) -> type[BaseModel]:
    """Make a pydantic model of a function's keyword-only parameters."""
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            annotation = parameter.annotation
            if isinstance(annotation, str):  # `from __future__ import annotations`
                annotation = eval(annotation, function.__globals__)  # the plugin's own source text
            default = ... if parameter.default is inspect.Parameter.empty else parameter.default
            fields[parameter.name.rstrip("_")] = (annotation, default)
    model: type[BaseModel] = create_model(function.__name__, __base__=Parameters, **fields)
    return model


def _python_name(name: str) -> str:
    """Return a parameter's name in Python: `lambda` is `lambda_` there."""
    import keyword

    return f"{name}_" if keyword.iskeyword(name) else name


class Kind(StrEnum):
    """The part that a tensor plays."""

    LINEAR = "linear"
    EMBEDDING = "embedding"
    NORM = "norm"
    BIAS = "bias"
    CONV = "conv"
    BUFFER = "buffer"
    OTHER = "other"
