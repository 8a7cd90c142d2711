"""What making an adapter costs, from the headers of its model alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from pydantic import BaseModel

from basiscli.checkpoints.views import Checkpoint
from basiscli.engine.pricing import Price, bytes_to_download, exact_svd_flops, fast_svd_flops, flops_per_worker
from basiscli.engine.rates import Rates
from basiscli.engine.settings import Settings
from basiscli.model.architecture import kind_by_name
from basiscli.transforms import DataInit, Kind, Method

_SMALL_MOMENT = 1024  # up to here `SVD.axes` takes all eigenvectors


class _Text(Protocol):
    """What a price asks of a `Calibration`."""

    @property
    def tokens(self) -> int: ...


class _Plan(Protocol):
    """What a price asks of an `InitPlan`, which imports this file and not the other way round."""

    @property
    def model(self) -> Checkpoint: ...
    @property
    def base(self) -> Checkpoint | None: ...
    @property
    def method(self) -> Method: ...
    @property
    def values(self) -> BaseModel: ...
    @property
    def rank(self) -> int: ...
    @property
    def exact(self) -> bool: ...
    @property
    def targets(self) -> Mapping[str, str]: ...
    @property
    def calibration(self) -> _Text | None: ...
    @property
    def trains_coefficients(self) -> bool: ...
    @property
    def expected_bytes(self) -> int: ...
    @property
    def settings(self) -> Settings: ...
    def linear_shape(self, name: str) -> tuple[int, int]: ...
    def workspace(self, name: str) -> int: ...


def init_price(plan: _Plan, rates: Rates) -> Price:
    """Return the bytes, the operations and the time of making an adapter from weights or from data."""
    read = sum(t.nbytes for t in plan.model.tensors.values()) * (2 if plan.base is not None else 1)
    if plan.calibration is None:
        flops, seconds = _from_weights(plan, rates)
    else:
        flops, seconds = _from_data(plan, plan.calibration.tokens, rates)
    return Price(
        read_bytes=read,
        write_bytes=plan.expected_bytes,
        flops=flops,
        seconds=(read + plan.expected_bytes) / rates.copy_bytes / plan.settings.workers + seconds,
        workers=plan.settings.workers,
        machine=rates.machine,
        download_bytes=bytes_to_download([plan.model, plan.base]),
    )


def _from_weights(plan: _Plan, rates: Rates) -> tuple[float, float]:
    """Return the operations and the seconds of decomposing the weights, or their differences from a base's."""
    if plan.trains_coefficients:
        return 0.0, 0.0
    exact = plan.exact or plan.method.name == "milora"
    decompose, per_second = (exact_svd_flops, rates.exact_flops) if exact else (fast_svd_flops, rates.fast_flops)
    work = [(decompose(plan.model.tensors[name].shape, plan.rank), plan.workspace(name)) for name in plan.targets]
    own = flops_per_worker(work, plan.settings.workers, plan.settings.shared_memory)
    return sum(flops for flops, _ in work), own / per_second


def _from_data(plan: _Plan, tokens: int, rates: Rates) -> tuple[float, float]:
    """Return the operations and the seconds of running the model over text and decomposing moments of its inputs."""
    inputs = [plan.linear_shape(name)[1] for name in plan.targets]
    parameters = sum(t.count for t in plan.model.tensors.values() if kind_by_name(t) is not Kind.EMBEDDING)
    # q, k and v, and gate and up, see the same inputs: about every second weight needs a moment of its own.
    forward = tokens * (2.0 * parameters + sum(2.0 * width**2 for width in inputs) / 2)
    if plan.method.shares_ranks:  # of each input's moment as many axes as are offered for sharing out
        method: DataInit = plan.method.implementation(plan.values)
        sides, share = [(width, width) for width in inputs], 0.5
        count = method.offered(plan.rank)
    else:  # every weight times its inputs' covariance
        sides, share, count = [plan.linear_shape(name) for name in plan.targets], 1.0, plan.rank
    vectors, seconds = 0.0, forward / rates.forward_flops
    for side in sides:
        exact = plan.exact or (plan.method.shares_ranks and side[0] <= _SMALL_MOMENT)
        flops = share * (exact_svd_flops if exact else fast_svd_flops)(side, count)
        vectors += flops
        seconds += flops / (rates.exact_flops if exact else rates.fast_flops)
    return forward + vectors, seconds / plan.settings.workers
