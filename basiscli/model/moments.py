"""Second moments of the inputs of linear layers over calibration text, as tasks that any process can run.

For every layer there are two rounds of tasks. First each batch of windows is run through the layer, and its hidden
states and the inputs of the layer's targets go to the tensor store. Then each row block of each moment matrix is summed
over the batches in their order: so no sum depends on which worker runs which task.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from basiscli.calibration.tokens import Windows
from basiscli.checkpoints.shards import Shards
from basiscli.checkpoints.views import Checkpoint
from basiscli.engine.devices import working_dtype
from basiscli.engine.tasks import Engine, Task
from basiscli.engine.tensor_store import TensorStore, get_windows, store_for
from basiscli.engine.threads import Threads
from basiscli.errors import InputError
from basiscli.linalg.finite import is_finite
from basiscli.model.layer_inputs import Inputs
from basiscli.model.layerwise import LayerwiseModel
from basiscli.model.stored_moments import StoredMoments, add_rows, block_bytes, block_key, empty_sums, moment_blocks
from basiscli.progress import PartOf, Progress


class CalibrationPlan(Protocol):
    """The part of a plan that names a model and the modules whose inputs are collected."""

    @property
    def model(self) -> Checkpoint:
        """The checkpoint of the model to run."""

    @property
    def targets(self) -> Mapping[str, str]:
        """Names of target modules in the loaded model, by their weights' names in the checkpoint."""


@dataclass(frozen=True)
class CalibrationTargets:
    """A `CalibrationPlan` of a model and its targets alone."""

    model: Checkpoint
    targets: Mapping[str, str]


@dataclass
class MomentsRun:
    """Runs calibration text through a model and sums second moments of its targets' inputs.

        for part in MomentsRun(plan, output, progress, device, engine).moments(windows):
            for module, stored in part.items():
                inputs = stored.load(device)  # InputMoments

    `moments` gives the engine tasks that call `embed`, `forward_layer`, `forward_head` and `add`; on a cluster every
    worker has its own `MomentsRun`.
    """

    plan: CalibrationPlan
    output: Shards
    progress: Progress
    device: torch.device
    engine: Engine
    _model: LayerwiseModel | None = None
    _readers: dict[str, str] = field(default_factory=dict)
    """CalibrationTargets whose inputs are being summed, and the first of those that read the same."""
    _stored: dict[str, StoredMoments] = field(default_factory=dict)
    """By the first module that reads them."""
    _lock: Any = field(default_factory=threading.Lock)

    def moments(self, windows: Windows) -> Iterator[dict[str, StoredMoments]]:
        """Yield the moments of each layer's targets by module name; they are valid until the next are asked for.

        Targets that read the same tensor share one object. Targets outside the layers come in the first dictionary or
        the last one.

        Raises:
            InputError: the model cannot be run layer by layer, or its weights are missing or give NaN.
        """
        store = store_for(self.engine, self.output, windows)
        (text,) = self._do([Task("entering", 0, self._workspace(0), (store,))], self.embed)
        sizes, layers = text["sizes"], text["layers"]
        # In memory the inputs of as many batches wait to be added as pass side by side; on a disk all may.
        step = self.engine.workers if isinstance(self.engine, Threads) else len(sizes)
        waves = [range(first, min(first + step, len(sizes))) for first in range(0, len(sizes), step)]
        self.progress.start("reading inputs", layers, layers * sum(sizes), "tokens")
        self._sum("before", dict(enumerate(text["inputs"])), store)
        outside = [name for name in self.plan.targets.values() if not name.startswith(f"{text['path']}.")]
        late = [name for name in outside if name not in self._readers]
        yield from self._summed()
        for layer in range(layers):
            for wave in waves:
                tasks = [
                    Task(f"layer {layer} of batch {n}", sizes[n], self._workspace(sizes[n]), (layer, n, store))
                    for n in wave
                ]
                self._sum(f"layer{layer}", dict(zip(wave, self._do(tasks, self.forward_layer), strict=True)), store)
                for batch in wave:
                    store.drop(_hidden(layer, batch))
            if self._model is not None:
                self._model.release()
            yield from self._summed()
        for wave in waves if late else ():
            tasks = [Task(f"end of batch {n}", 0, self._workspace(sizes[n]), (layers, n, late, store)) for n in wave]
            self._sum("after", dict(zip(wave, self._do(tasks, self.forward_head), strict=True)), store)
        if self._model is not None:
            self._model.release()
        yield from self._summed()

    # Tasks ------------------------------------------------------------------------------------------------------------

    def embed(self, store: TensorStore) -> dict[str, Any]:
        """Run all batches up to the first layer; return layers' count and path, and each batch's tokens and inputs."""
        model = self._layerwise(store)
        inputs = []
        for batch, (hidden, given) in enumerate(model.forward_to_layers()):
            store.put(_hidden(0, batch), {"hidden": hidden})
            inputs.append(_kept(given, _inputs("before", batch), store))
        sizes = [batch.ids.numel() for batch in model.batches]
        return {"path": model.path, "layers": len(model.layers), "sizes": sizes, "inputs": inputs}

    def forward_layer(self, layer: int, batch: int, store: TensorStore) -> dict[str, Any]:
        """Run a batch through a layer, hidden states in the store; return readers and shapes of its targets' inputs."""
        model = self._layerwise(store)
        (hidden,) = store.get(_hidden(layer, batch)).values()
        hidden, inputs = model.forward_layer(layer, batch, hidden.to(model.device))
        if not is_finite(hidden):
            raise InputError(
                f"layer {layer} gives NaN or Inf on the calibration text",
                file=self.plan.model.source.folder,
                remedy="check the model with `basis eval`, or give a sound checkpoint",
            )
        store.put(_hidden(layer + 1, batch), {"hidden": hidden})
        return _kept(inputs, _inputs(f"layer{layer}", batch), store)

    def forward_head(self, layers: int, batch: int, late: Sequence[str], store: TensorStore) -> dict[str, Any]:
        """Run a batch from the last layer's output to the targets after it; return as `forward_layer` does."""
        model = self._layerwise(store)
        (hidden,) = store.get(_hidden(layers, batch)).values()
        inputs = model.forward_head(batch, hidden.to(model.device), late)
        return _kept(inputs, _inputs("after", batch), store)

    def add(self, module: str, block: slice, keys: Sequence[str], is_begun: bool, store: TensorStore) -> dict[str, Any]:
        """Add a module's inputs in some batches to one row block of their moments, taken about the first batch's mean.

        Raises:
            InputError: NaN or Inf among the inputs.
        """
        sums = {name: x.clone() for name, x in store.get(block_key(module, block)).items()} if is_begun else {}
        for key in keys:
            rows, mean = (x.to(self.device) for x in store.get(key, module, _mean(module)).values())
            sums = sums or empty_sums(block, mean)
            add_rows(sums, block, rows)
        if not is_finite(sums["second"]):
            raise InputError(
                "what this layer gets from the calibration text holds NaN or Inf",
                file=self.plan.model.source.folder,
                tensor=f"{module}.weight",
                remedy="check the model with `basis eval`, or give a sound checkpoint",
            )
        store.put(block_key(module, block), sums)
        return {}

    def _layerwise(self, store: TensorStore) -> LayerwiseModel:
        with self._lock:
            if self._model is None:
                read = self.plan.model
                dtype = working_dtype(self.device, read.tensors.values())
                windows = get_windows(store)
                self._model = LayerwiseModel(read, list(self.plan.targets.values()), windows, self.device, dtype)
            return self._model

    # Giving tasks to the engine ---------------------------------------------------------------------------------------

    @property
    def _is_local(self) -> bool:
        return isinstance(self.engine, Threads)

    def _do(self, tasks: Sequence[Task], do: Callable[..., dict[str, Any]]) -> list[dict[str, Any]]:
        """Have tasks done, and return their results in the tasks' order."""
        done: dict[str, dict[str, Any]] = {}
        self.engine.run_tasks(tasks, do, done.__setitem__, progress=PartOf(self.progress), what="")
        return [done[task.key] for task in tasks]

    def _sum(self, where: str, passed: Mapping[int, dict[str, Any]], store: TensorStore) -> None:
        """Have the inputs that batches left in the store added to the moments."""
        keys: dict[str, list[str]] = {}
        counts: Counter[str] = Counter()
        for batch, left in passed.items():
            for module, first in left["readers"].items():
                if self._readers.setdefault(module, first) != first:
                    raise InputError(
                        f"it reads the same tensor as {first} in one part of the text, and another in the next",
                        tensor=f"{module}.weight",
                        remedy="leave it out with --target-modules",
                    )
            for module, (count, width) in left["rows"].items():
                self._stored.setdefault(module, StoredMoments(store, module, width, 0))
                counts[module] += count
                if count:
                    keys.setdefault(module, []).append(_inputs(where, batch))
        tasks = [
            Task(
                f"{module}, moments from {block.start}", 0, 0 if self._is_local else block_bytes(block, stored.width),
                (module, block, keys[module], stored.count > 0, store),
            )
            for module, stored in self._stored.items()
            if module in keys
            for block in moment_blocks(stored.width)
        ]  # fmt: skip
        self._do(tasks, self.add)
        for module, count in counts.items():
            self._stored[module] = replace(self._stored[module], count=self._stored[module].count + count)
        for batch in passed:
            store.drop(_inputs(where, batch))

    def _summed(self) -> Iterator[dict[str, StoredMoments]]:
        """Yield the moments that are complete, and forget them."""
        if self._stored:
            yield {module: self._stored[first] for module, first in self._readers.items()}
        for stored in self._stored.values():
            stored.drop()
        self._stored, self._readers = {}, {}

    def _workspace(self, tokens: int) -> int:
        """Return the memory of a worker that runs so many tokens through a layer."""
        if self._is_local:
            return 0  # they share the layer, and --workers says how many batches are to pass it side by side
        parts: Counter[str] = Counter()
        widths: Counter[str] = Counter()
        for name, tensor in self.plan.model.tensors.items():
            layer = re.search(r"\.(\d+)\.", name)
            parts[layer[1] if layer else ""] += tensor.count
            if name in self.plan.targets:
                widths[layer[1] if layer else ""] += sum(tensor.shape)
        return 4 * (max(parts.values()) + tokens * max(widths.values()))


def _kept(inputs: Inputs, key: str, store: TensorStore) -> dict[str, Any]:
    """Put inputs in the store for the tasks that add them; return which modules read them, and their shapes."""
    given = {module: rows for module, rows in inputs.rows.items() if len(rows)}
    means = {_mean(module): rows.mean(0, dtype=torch.float64).float() for module, rows in given.items()}
    store.put(key, given | means)
    return {"readers": inputs.readers, "rows": {module: list(rows.shape) for module, rows in inputs.rows.items()}}


def _inputs(where: str, batch: int) -> str:
    return f"inputs-{where}-{batch}"


def _hidden(layer: int, batch: int) -> str:
    return f"hidden-{layer}-{batch}"


def _mean(module: str) -> str:
    return f"{module}-mean"
