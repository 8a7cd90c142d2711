"""A forward of a transformer layer by layer, with one layer's weights in memory at a time."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from basiscli.calibration.tokens import Windows
from basiscli.checkpoints.views import Checkpoint
from basiscli.engine.devices import ran_out_of_memory, return_large_blocks
from basiscli.errors import InputError
from basiscli.model.layer_inputs import Collector, Inputs, StopForward
from basiscli.model.lazy_model import LazyWeights, empty_model

_BATCH_TOKENS = 1024  # of the windows that pass a layer together

LayerArguments = list[tuple[tuple[Any, ...], dict[str, Any]]]
"""The positional and keyword arguments of every layer besides the hidden states."""
Call = Callable[[int, Tensor, tuple[Any, ...], dict[str, Any]], Tensor]
"""Called with a layer's index, hidden states and other arguments; returns hidden states."""


@dataclass
class LayerwiseModel:
    """A transformer that runs calibration text layer by layer, reading one layer's weights at a time.

        model = LayerwiseModel(checkpoint, ["model.layers.0.mlp.up_proj", …], windows, device, torch.float32)
        states = [hidden for hidden, inputs in model.forward_to_layers()]  # one a batch
        for layer in range(len(model.layers)):
            for batch, hidden in enumerate(states):
                states[batch], inputs = model.forward_layer(layer, batch, hidden)

    Several threads may call it at the same time, all for the same layer. The arguments of every layer (masks, rotary
    angles) are recorded from the model's own forward, with its layers replaced by ones that return their input: so no
    architecture's forward is written again here.
    """

    checkpoint: Checkpoint
    targets: Sequence[str]
    """Names of the modules whose inputs are collected, as in `model.named_modules()`."""
    windows: Windows
    device: torch.device
    dtype: torch.dtype
    model: Any = field(init=False)
    batches: list[Windows] = field(init=False)
    """The calibration windows in batches of about 1024 tokens, one forward each."""
    path: str = field(init=False)
    """Name of `layers` in the model: `model.layers`."""
    layers: nn.ModuleList = field(init=False)
    _weights: LazyWeights = field(init=False)
    _arguments: list[LayerArguments] = field(default_factory=list)
    """By batch, once `forward_to_layers` has passed."""
    _entered: bool = False
    """Whether a forward has passed all layers and the rest of it is not wanted."""
    _held: int | None = None
    """The layer whose weights are in memory."""
    _lock: Any = field(default_factory=threading.RLock)
    """For what threads share: which layer's weights are held, and the list of layers."""
    _here: threading.local = field(default_factory=threading.local)
    """Holds this thread's collector."""

    def __post_init__(self) -> None:
        return_large_blocks()
        self.model = empty_model(self.checkpoint, self.dtype)
        main = getattr(self.model, "main_input_name", "input_ids")
        if main != "input_ids":
            raise InputError(
                f"the model reads {main}, and calibration is tokens",
                file=self.checkpoint.source.folder / "config.json",
                remedy="a method that needs no calibration, such as --method pissa",
            )
        for module in self.model.modules():
            module.register_forward_pre_hook(self._end_after_layers)
        self._weights = LazyWeights(self.model, self.checkpoint, self.device, self.dtype)
        self.path, self.layers = self._layers()
        for name in self.targets:
            self.model.get_submodule(name).register_forward_pre_hook(self._hook(name))
        count = max(1, _BATCH_TOKENS // self.windows.ids.shape[1])
        self.batches = [self.windows.select(part.tolist()) for part in torch.arange(len(self.windows)).split(count)]

    # Forwards ---------------------------------------------------------------------------------------------------------

    def forward_to_layers(self) -> Iterator[tuple[Tensor, Inputs]]:
        """Yield each batch's hidden states before the first layer [windows, tokens, d], and inputs of targets.

        Raises:
            InputError: the model's forward is more than a loop over its layers, or weights are missing.
        """
        self._arguments.clear()
        for batch in self.batches:
            with self._collecting(batch) as collector:
                hidden, recorded = self._record(batch)
            self._arguments.append(recorded)
            yield hidden, collector.inputs
        self.release()  # embeddings, most of all

    def forward_layer(self, layer: int, batch: int, hidden: Tensor) -> tuple[Tensor, Inputs]:
        """Return a layer's output [windows, tokens, d] for a batch's hidden states, and the inputs of targets in it."""
        args, kwargs = self._arguments_of(batch)[layer]
        with self._lock:
            if self._held != layer:
                self.release()
                self._weights.load(self.layers[layer], f"{self.path}.{layer}")
                self._held = layer
        with self._collecting(self.batches[batch]) as collector, self._running():
            out = self.layers[layer](hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out, collector.inputs

    def forward_head(self, batch: int, hidden: Tensor, targets: Sequence[str]) -> Inputs:
        """Return the inputs of targets after the layers, given the last layer's output [windows, tokens, d].

        The forward ends when all of these targets have been called.
        """

        def replay(layer: int, given: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            return hidden

        with self._lock, self._collecting(self.batches[batch], targets) as collector:
            self._forward(replay, self.batches[batch])
        return collector.inputs

    def release(self) -> None:
        """Free the memory of all weights; they are read again when they are needed."""
        self._weights.release()
        self._held = None

    def _record(self, windows: Windows) -> tuple[Tensor, LayerArguments]:
        """Return the hidden states before the first layer, and each layer's other arguments."""
        recorded: LayerArguments = []
        seen: list[Tensor] = []

        def record(layer: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            if layer != len(recorded) or (seen and hidden is not seen[-1]):
                raise InputError(
                    "the model does more between its layers than to pass hidden states on",
                    file=self.checkpoint.source.folder / "config.json",
                    remedy="a method that needs no calibration, such as --method pissa",
                )
            recorded.append((args, kwargs))
            seen.append(hidden)
            self._entered = layer == len(self.layers) - 1
            return hidden

        self._forward(record, windows)
        self._entered = False
        if len(recorded) < len(self.layers):
            raise InputError(
                f"only {len(recorded)} of {len(self.layers)} layers are run by the model's forward",
                file=self.checkpoint.source.folder / "config.json",
                remedy="a method that needs no calibration, such as --method pissa",
            )
        return seen[0], recorded

    def _arguments_of(self, batch: int) -> LayerArguments:
        with self._lock:
            if not self._arguments:  # on a cluster another process ran the text up to the layers
                for _ in self.forward_to_layers():
                    pass
        return self._arguments[batch]

    def _forward(self, call: Call, windows: Windows) -> None:
        """Run the model's own forward with a function in every layer's stead."""
        layers = list(self.layers)
        try:
            for index, layer in enumerate(layers):
                self.layers[index] = _StandIn(layer, index, call)
            with self._running():
                self.model(**{name: x.to(self.device) for name, x in windows.inputs.items()}, use_cache=False)
        except StopForward:
            pass
        finally:
            for index, layer in enumerate(layers):
                self.layers[index] = layer

    def _end_after_layers(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._entered and any(True for _ in module.parameters(recurse=False)):
            raise StopForward  # the first module after the layers

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Say what is wrong with a model whose forward fails: its config and its weights do not fit, mostly."""
        config, length = self.model.config.get_text_config(), self.windows.ids.shape[1]
        positions = getattr(config, "max_position_embeddings", None)
        try:
            with torch.no_grad():
                yield
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            if ran_out_of_memory(error):
                raise
            if isinstance(error, IndexError) and positions and length > positions:
                raise InputError(
                    f"windows of {length} tokens, and the model has {positions} positions",
                    file=self.checkpoint.source.folder / "config.json",
                    remedy=f"--length {positions}",
                ) from error
            raise InputError(
                f"the model does not run on the calibration text: {str(error).splitlines()[0]}",
                file=self.checkpoint.source.folder / "config.json",
                remedy="check it with `basis eval`, or restore the config.json that belongs to these weights",
            ) from error

    # Inputs of targets ------------------------------------------------------------------------------------------------

    @contextmanager
    def _collecting(self, windows: Windows, awaited: Sequence[str] = ()) -> Iterator[Collector]:
        counted = None if windows.counted is None else windows.counted.to(self.device)
        collector = self._here.collector = Collector(counted, set(awaited))
        try:
            yield collector
        finally:
            self._here.collector = None

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(module: nn.Module, args: tuple[Any, ...]) -> None:
            collector: Collector | None = getattr(self._here, "collector", None)
            if collector is not None:
                collector.add(name, args[0])

        return add

    # The model --------------------------------------------------------------------------------------------------------

    def _layers(self) -> tuple[str, nn.ModuleList]:
        """Return the name of the one list of layers that holds targets, and the list."""
        lists = {name: module for name, module in self.model.named_modules() if isinstance(module, nn.ModuleList)}
        outermost = {
            name: module
            for name, module in lists.items()
            if not any(name.startswith(f"{other}.") for other in lists if other != name)
        }
        modules = dict(self.model.named_modules())
        absent = [name for name in self.targets if name not in modules]
        if absent:
            layer = re.match(r".*?\.\d+(?=\.)", absent[0])
            if layer and layer[0] not in modules:
                raise InputError(
                    "the model that the config makes has no such layer",
                    file=self.checkpoint.source.folder / "config.json",
                    tensor=f"{absent[0]}.weight",
                    remedy="restore the config.json that belongs to these weights",
                )
            raise InputError(
                "transformers makes one module of several weights here: its inputs cannot be told apart",
                file=self.checkpoint.source.folder,
                tensor=f"{absent[0]}.weight",
                remedy="leave such weights out with --target-modules",
            )
        holding = [name for name in outermost if any(target.startswith(f"{name}.") for target in self.targets)]
        if len(holding) != 1:
            found = " and ".join(holding) or "no list of layers"
            raise InputError(
                f"the targets are in {found}: calibration runs one stack of layers",
                file=self.checkpoint.source.folder / "config.json",
                remedy="choose layers of one stack with --target-modules",
            )
        return holding[0], outermost[holding[0]]


class _StandIn(nn.Module):
    """Has a layer's attributes, and calls a function with the layer's index and arguments in place of its forward."""

    def __init__(self, layer: nn.Module, index: int, call: Call) -> None:
        super().__init__()
        object.__setattr__(self, "_layer", layer)
        self._index, self._call = index, call

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the function's result."""
        return self._call(self._index, hidden_states, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)
