"""The cost estimate of a KV compression, from the headers of its model."""

from __future__ import annotations

from typing import Protocol

from basiscli.checkpoints.layout import Layout
from basiscli.checkpoints.views import Checkpoint
from basiscli.engine.pricing import Price, bytes_to_download
from basiscli.engine.rates import Rates
from basiscli.model.architecture import kind_by_name
from basiscli.transforms import Kind

_SEARCH_ROUNDS = 15  # until three in a row find nothing better: 10 to 24 on SmolLM2


class _Settings(Protocol):
    """The fields of a `KVSettings` that a price needs."""

    @property
    def length(self) -> int: ...
    @property
    def workers(self) -> int: ...
    @property
    def moment_windows(self) -> int: ...
    @property
    def search_windows(self) -> int: ...


class _Plan(Protocol):
    """The fields of a `KVPlan` that a price needs; `plan.py` imports this file, and not the other way round."""

    @property
    def model(self) -> Checkpoint: ...
    @property
    def earlier(self) -> object | None: ...
    @property
    def train_tokens(self) -> int: ...
    @property
    def searches(self) -> bool: ...
    @property
    def layout(self) -> Layout: ...
    @property
    def settings(self) -> _Settings: ...


def kv_price(plan: _Plan, search_batch: int, rates: Rates) -> Price:
    """Return the estimated cost of a KV compression: bytes, floating-point operations and seconds.

    The search is counted with its usual number of rounds.

    Args:
        plan: of the compression.
        search_batch: windows per round of the search.
        rates: measured throughput of one worker.
    """
    settings, length = plan.settings, plan.settings.length
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
        tokens += length * (3 * held + _SEARCH_ROUNDS * (5 * search_batch + held))
    training = 2.0 * (layers + head) * tokens
    streamed = 2 * read + plan.layout.nbytes  # read once to be run, and once to be written
    seconds = streamed / rates.copy_bytes + statistics / rates.forward_flops + training / rates.training_flops
    return Price(
        read_bytes=2 * read,
        write_bytes=plan.layout.nbytes,
        flops=statistics + training,
        seconds=seconds / settings.workers,
        workers=settings.workers,
        machine=rates.machine,
        download_bytes=bytes_to_download([plan.model]),
    )
