"""What a plan would take: bytes, floating-point operations, and hours at the rates of `engine.rates`.

Operations are counted from shapes, multiplications and additions alike, as the algorithms of `linalg` do them: n × n
eigenvectors as 9 n³, the product of m × k and k × n as 2 m n k. What an elementwise method does to each number is in
its measured rate; of its operations only the weighted sum and the statistics of the report are counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from basiscli.checkpoints.adapter_view import AdapterView
from basiscli.checkpoints.views import Checkpoint
from basiscli.commands.init.plan import InitPlan
from basiscli.commands.kv.plan import SEARCH_BATCH, KVPlan
from basiscli.commands.merge.plan import MergePlan, workspace
from basiscli.engine.partial import Plan
from basiscli.engine.rates import MEASURED, Rates
from basiscli.engine.settings import Settings
from basiscli.model.architecture import kind_by_name
from basiscli.names import format_count, format_size
from basiscli.transforms import DataInit, Kind

_EIGEN = 9  # operations of a symmetric eigendecomposition with vectors, in n³
_SMALL_MOMENT = 1024  # up to here `SVD.axes` takes all eigenvectors
_KRYLOV_BLOCKS = 8  # of rank + 8 columns each: what `fast_svd` needs on weights of language models, about
_SEARCH_ROUNDS = 15  # until three in a row find nothing better: 10 to 24 on SmolLM2


@dataclass(frozen=True)
class Price:
    """What a run would take on so many workers of the machine whose rates these are."""

    read_bytes: int
    write_bytes: int
    flops: float
    seconds: float
    workers: int
    machine: str
    download_bytes: int = 0
    """Of models on the Hub whose headers alone are here."""

    @property
    def hours(self) -> float:
        """The time in hours."""
        return self.seconds / 3600

    @property
    def time(self) -> str:
        """The time as a person reads it."""
        if self.seconds < 90:
            return f"{max(1, round(self.seconds))} s"
        return f"{self.seconds / 60:.0f} minutes" if self.seconds < 5400 else f"{self.seconds / 3600:.1f} hours"

    def sentence(self) -> str:
        """Return operations and time as a person reads them."""
        rate = format_size((self.read_bytes + self.write_bytes) / max(self.seconds, 1e-9))
        fetched = f"download {format_size(self.download_bytes)}, then " if self.download_bytes else ""
        return (
            f"{fetched}{_operations(self.flops)}: about {self.time} with {format_count(self.workers, 'worker')}, "
            f"each {self.machine}, on storage of at least {rate}/s"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, for `--json`."""
        return {**vars(self), "hours": self.hours}


def _operations(flops: float) -> str:
    for unit in ("", "k", "M", "G", "T", "P"):
        if flops < 1000:
            return f"{flops:.3g} {unit}FLOP"
        flops /= 1000
    return f"{flops:.4g} EFLOP"


def price_of(plan: Plan, rates: Rates = MEASURED) -> Price | None:
    """Return what a plan of any command would take; None for one that is not priced."""
    if isinstance(plan, MergePlan):
        return merge_price(plan, rates)
    if isinstance(plan, InitPlan):
        return init_price(plan, rates)
    return kv_price(plan, rates) if isinstance(plan, KVPlan) else None


def merge_price(plan: MergePlan, rates: Rates = MEASURED) -> Price:
    """Return what a merge would take."""
    names, tensors = [*plan.merged, *plan.copied], plan.reference.tensors
    sources = len(plan.models) + (plan.base is not None)
    # Reading, converting, hashing and writing cost the same a byte whatever the method adds.
    streamed = plan.read_bytes + plan.write_bytes + 2 * plan.scratch_bytes
    elements = sum(tensors[name].count for name in names)
    flops = 2.0 * len(plan.models) * elements
    if plan.base is not None:
        flops += 2.0 * sources**2 * elements
    seconds = streamed / rates.merge_bytes(plan.method.name) / plan.settings.workers
    if plan.two_passes:
        steps = len(plan.models) - 1
        work = [
            (steps * _projection(tensors[name].shape), workspace(plan, name))
            for name in plan.merged
            if kind_by_name(tensors[name]) is Kind.LINEAR and len(tensors[name].shape) == 2
        ]
        if not any(isinstance(model, AdapterView) for model in plan.models):  # factors of adapters cost next to nothing
            flops += sum(own for own, _ in work)
            seconds += _shared(work, plan.settings) / rates.exact_flops
    needed = [plan.reference, *(m.adapter.weights if isinstance(m, AdapterView) else m for m in plan.models)]
    fetched = _to_download(needed)
    return Price(plan.read_bytes, plan.write_bytes, flops, seconds, plan.settings.workers, rates.machine, fetched)


def init_price(plan: InitPlan, rates: Rates = MEASURED) -> Price:
    """Return what an initialisation would take."""
    settings = plan.settings
    read = sum(t.nbytes for t in plan.model.tensors.values()) * (2 if plan.base is not None else 1)
    if plan.calibration is not None:
        return _from_data(plan, rates, read)
    exact = plan.exact or plan.method.name == "milora"
    decompose, per_second = (_exact_svd, rates.exact_flops) if exact else (_fast_svd, rates.fast_flops)
    work = [
        (decompose(plan.model.tensors[name].shape, plan.rank), plan.workspace(name))
        for name in plan.targets
        if not plan.trains_coefficients
    ]
    seconds = (read + plan.expected_bytes) / rates.copy_bytes / settings.workers + _shared(work, settings) / per_second
    flops = sum(own for own, _ in work)
    return Price(
        read,
        plan.expected_bytes,
        flops,
        seconds,
        settings.workers,
        rates.machine,
        _to_download([plan.model, plan.base]),
    )


def _from_data(plan: InitPlan, rates: Rates, read: int) -> Price:
    """Price running the model over the text, the moments of its inputs, and their eigenvectors."""
    assert plan.calibration is not None
    inputs = [plan.linear_shape(name)[1] for name in plan.targets]
    parameters = sum(t.count for t in plan.model.tensors.values() if kind_by_name(t) is not Kind.EMBEDDING)
    # q, k and v, and gate and up, see the same inputs: about every second weight needs a moment of its own.
    forward = plan.calibration.tokens * (2.0 * parameters + sum(2.0 * width**2 for width in inputs) / 2)
    if plan.method.shares_ranks:  # of each input's moment as many axes as are offered for sharing out
        method: DataInit = plan.method.implementation(plan.values)
        sides, share = [(width, width) for width in inputs], 0.5
        count = method.offered(plan.rank)
    else:  # every weight times its inputs' covariance
        sides, share, count = [plan.linear_shape(name) for name in plan.targets], 1.0, plan.rank
    vectors, seconds = 0.0, (read + plan.expected_bytes) / rates.copy_bytes + forward / rates.forward_flops
    for side in sides:
        exact = plan.exact or (plan.method.shares_ranks and side[0] <= _SMALL_MOMENT)
        flops = share * (_exact_svd if exact else _fast_svd)(side, count)
        vectors += flops
        seconds += flops / (rates.exact_flops if exact else rates.fast_flops)
    workers = plan.settings.workers
    fetched = _to_download([plan.model])
    return Price(read, plan.expected_bytes, forward + vectors, seconds / workers, workers, rates.machine, fetched)


def kv_price(plan: KVPlan, rates: Rates = MEASURED) -> Price:
    """Return what a compression of a KV cache would take, at the usual number of rounds of its search."""
    settings, length, workers = plan.settings, plan.settings.length, plan.settings.workers
    tensors = plan.model.tensors.values()
    read = sum(t.nbytes for t in tensors)
    embeddings = [t.count for t in tensors if kind_by_name(t) is Kind.EMBEDDING]
    heads = [t.count for t in tensors if t.name.endswith(("lm_head.weight", "embed_out.weight"))]
    head = max(heads or embeddings, default=0)  # one that is tied is the embedding
    layers = sum(t.count for t in tensors) - sum(embeddings) - sum(heads)
    statistics = 0.0 if plan.earlier else 2.0 * layers * settings.moment_windows * length
    # In tokens that pass the model: a step of training is a forward of the dense model, one of the projected, and a
    # backward, which goes to activations alone and is as much as a forward.
    tokens = 3 * plan.train_tokens
    if plan.searches:
        held = settings.search_windows
        tokens += length * (3 * held + _SEARCH_ROUNDS * (5 * SEARCH_BATCH + held))
    training = 2.0 * (layers + head) * tokens
    streamed = 2 * read + plan.layout.nbytes  # read once to be run, and once to be written
    seconds = streamed / rates.copy_bytes + statistics / rates.forward_flops + training / rates.training_flops
    return Price(
        2 * read,
        plan.layout.nbytes,
        statistics + training,
        seconds / workers,
        workers,
        rates.machine,
        _to_download([plan.model]),
    )


def _to_download(checkpoints: Iterable[Checkpoint | None]) -> int:
    """Return the bytes of weights that are on the Hub, and not here, each model's once."""
    remote = {c.source.path: c for c in checkpoints if c is not None and c.source.is_remote}
    return sum(tensor.nbytes for checkpoint in remote.values() for tensor in checkpoint.tensors.values())


def _shared(work: Sequence[tuple[float, int]], settings: Settings) -> float:
    """Return the operations that are left to each worker, of tasks with their operations and bytes of memory.

    In one machine's memory large tasks do not fit side by side, however many workers there are; see `Threads`.
    """
    even = sum(flops for flops, _ in work) / settings.workers
    if settings.cluster is not None or not work:
        return even
    budget = max([settings.memory, *(held for _, held in work)])
    return max(even, sum(flops * held for flops, held in work) / budget)


def _projection(shape: Iterable[int]) -> float:
    """Return the operations of a dense step of `linalg.projection`: two thirds of SᵀS, its vectors, U, T V, U M Vᵀ."""
    n, m = sorted(shape)
    return (4 / 3 + 6) * m * n**2 + _EIGEN * n**3


def _exact_svd(shape: Iterable[int], rank: int) -> float:
    n, m = sorted(shape)
    return 2.0 * m * n**2 + _EIGEN * n**3 + 2.0 * m * n * rank


def _fast_svd(shape: Iterable[int], rank: int) -> float:
    """Return the operations of a block Krylov iteration: two products a block, and its basis made orthogonal twice."""
    n, m = sorted(shape)
    columns = _KRYLOV_BLOCKS * (rank + min(rank, 8))
    if 2 * columns >= n:
        return _exact_svd((n, m), rank)
    return 4.0 * m * n * columns + 8.0 * n * columns**2 + _EIGEN * columns**3
