"""Second moments of a model's queries, keys and values, as tasks of a few windows each that any process can run."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from basiscli.calibration.tokens import Windows
from basiscli.checkpoints.shards import Shards
from basiscli.commands.kv.attention import AttentionMomentSums
from basiscli.commands.kv.plan import KVPlan
from basiscli.engine.devices import working_dtype
from basiscli.engine.tasks import Engine, Task
from basiscli.engine.tensor_store import TensorStore, get_windows, store_for
from basiscli.engine.threads import Threads
from basiscli.progress import PartOf, Progress
from basiscli.runtime.kv_projection import attach, attention_modules
from basiscli.runtime.load import load_weights

_WINDOWS = 4  # a task


@dataclass
class KVStatistics:
    """Runs calibration windows through the dense model and sums moments; on a cluster every worker has its own."""

    plan: KVPlan
    output: Shards
    progress: Progress
    device: torch.device
    engine: Engine
    model: Any = None
    """The loaded model; None to load it when the first task runs."""
    _collectors: Sequence[AttentionMomentSums] = ()
    _lock: Any = field(default_factory=threading.Lock)

    def moments(self, windows: Windows) -> dict[str, Tensor]:
        """Return `keys`, `values` and `queries` summed over all windows in order, float64 [layers, KV heads, d, d]."""
        is_local = isinstance(self.engine, Threads)
        store = store_for(self.engine, self.output, windows)
        # Threads share the model; --workers says how many windows are to pass it side by side.
        workspace = 0 if is_local else 4 * sum(tensor.count for tensor in self.plan.model.tensors.values())
        parts = [range(first, min(first + _WINDOWS, len(windows))) for first in range(0, len(windows), _WINDOWS)]
        tasks = [
            Task(_key(part), len(part) * windows.ids.shape[1], workspace, (part.start, part.stop, store))
            for part in parts
        ]
        self.progress.start("statistics", len(tasks), windows.ids.numel(), "tokens")
        progress = PartOf(self.progress)
        self.engine.run_tasks(tasks, self.add_up, lambda key, entry: None, progress=progress, what="statistics")
        sums: dict[str, Tensor] = {}
        for part in parts:
            for name, moment in store.get(_key(part)).items():
                sums[name] = sums[name] + moment if name in sums else moment
            store.drop(_key(part))
        return sums

    def add_up(self, first: int, last: int, store: TensorStore) -> dict[str, Any]:
        """Run windows first … last − 1 through the model and put the sums of all layers into the store."""
        windows = get_windows(store)
        collectors = self._attached()
        for collector in collectors:
            collector.begin()
        for place in range(first, last):
            window = windows.select([place])
            for collector in collectors:
                collector.set_mask(None if window.attention_mask is None else window.attention_mask.to(self.device))
            with torch.no_grad():
                given = {name: x.to(self.device) for name, x in window.inputs.items()}
                self.model(**given, use_cache=False, logits_to_keep=1)
        found = [collector.sums for collector in collectors]
        store.put(_key(range(first, last)), {name: torch.stack([sums[name] for sums in found]) for name in found[0]})
        return {}

    def _attached(self) -> Sequence[AttentionMomentSums]:
        with self._lock:
            if self.model is None:
                dtype = working_dtype(self.device, self.plan.model.tensors.values())
                self.model = load_weights(self.plan.model.source.folder, dtype, self.device)
            if not self._collectors:
                self._collectors = [AttentionMomentSums() for _ in attention_modules(self.model)]
                attach(self.model, self._collectors)
            return self._collectors


def _key(part: range) -> str:
    return f"moments-{part.start}"
