"""Running a transformer layer by layer from its shards: of the weights one layer is in memory at a time."""

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
from basiscli.checkpoints.transfer import read_to
from basiscli.checkpoints.views import Checkpoint
from basiscli.engine.devices import give_back_memory, keep_small_blocks, ran_out_of_memory
from basiscli.errors import InputError
from basiscli.model.architecture import loaded_names
from basiscli.model.layer_inputs import Collector, Enough, Inputs

_BATCH_TOKENS = 1024  # of the windows that pass a layer together
_META = torch.device("meta")
_GAMMA, _BETA = re.compile(r"(?<=LayerNorm\.)gamma$"), re.compile(r"(?<=LayerNorm\.)beta$")


LayerArguments = list[tuple[tuple[Any, ...], dict[str, Any]]]
"""What every layer is called with besides the hidden states."""


@dataclass
class LayerwiseModel:
    """A model on the meta device whose modules read their weights when they are first called.

    The calibration text passes it one layer at a time, in batches of windows: `enter` once, then `through` for every
    layer and batch, then `leave`. Several threads may do so side by side, all in the same layer. The arguments of every
    layer (masks, rotary angles) are what the model's own forward hands to it, recorded with layers that pass on what
    they get: so no architecture's forward is written again here.
    """

    checkpoint: Checkpoint
    targets: Sequence[str]
    """Modules whose inputs are wanted, by the names of the loaded model."""
    windows: Windows
    device: torch.device
    dtype: torch.dtype
    model: Any = field(init=False)
    batches: list[Windows] = field(init=False)
    path: str = field(init=False)
    """Name of the list of layers."""
    layers: nn.ModuleList = field(init=False)
    _stored: dict[str, str] = field(init=False)
    _arguments: list[LayerArguments] = field(default_factory=list)
    """Of every batch, once the text has entered."""
    _entered: bool = False
    """Whether a forward has passed all layers and the rest of it is not wanted."""
    _held: int | None = None
    """The layer whose weights are in memory."""
    _lock: Any = field(default_factory=threading.RLock)
    """For what threads share: the weights, and the list of layers."""
    _here: threading.local = field(default_factory=threading.local)
    """Holds this thread's collector."""

    def __post_init__(self) -> None:
        keep_small_blocks()
        self.model = empty_model(self.checkpoint, self.dtype)
        names = loaded_names(self.checkpoint, self.checkpoint.tensors)
        self._stored = {_modern(loaded): stored for stored, loaded in names.items()}
        for parameters in _same_parameters(self.model):  # tied weights are stored under one of their names
            stored = next((self._stored[name] for name in parameters if name in self._stored), None)
            self._stored |= dict.fromkeys(parameters, stored) if stored else {}
        for name, module in self.model.named_modules():
            for leaf, buffer in module.named_buffers(recurse=False):
                stored = self._stored.get(f"{name}.{leaf}")
                value = buffer if stored is None else self.checkpoint.read(stored).to(buffer.dtype)
                setattr(module, leaf, value.to(self.device))
            module.register_forward_pre_hook(lambda module, args, name=name: self.load(module, name))
        self.path, self.layers = self._layers()
        for name in self.targets:
            self.model.get_submodule(name).register_forward_pre_hook(self._hook(name))
        count = max(1, _BATCH_TOKENS // self.windows.ids.shape[1])
        places = torch.arange(len(self.windows)).split(count)
        self.batches = [self.windows.select(part.tolist()) for part in places]

    # The passes -------------------------------------------------------------------------------------------------------

    def forward_to_layers(self) -> Iterator[tuple[Tensor, Inputs]]:
        """Run what comes before the layers; yield each batch's hidden states, and the inputs of targets there.

        Raises:
            InputError: a model that cannot be run so, or weights that are missing.
        """
        self._arguments.clear()
        for batch in self.batches:
            with self._collecting(batch) as collector:
                hidden, recorded = self._record(batch)
            self._arguments.append(recorded)
            yield hidden, collector.inputs
        self.release()  # embeddings, most of all

    def forward_layer(self, place: int, number: int, hidden: Tensor) -> tuple[Tensor, Inputs]:
        """Run a batch through a layer; return its hidden states behind it, and the inputs of targets in it."""
        args, kwargs = self._arguments_of(number)[place]
        with self._lock:
            if self._held != place:
                self.release()
                self._held = place
        with self._collecting(self.batches[number]) as collector, self._running():
            out = self.layers[place](hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out, collector.inputs

    def forward_head(self, number: int, hidden: Tensor, wanted: Sequence[str]) -> Inputs:
        """Run what comes after the layers until these targets have been called; return their inputs."""

        def replay(place: int, given: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            return hidden

        batch = self.batches[number]
        with self._lock, self._collecting(batch, wanted) as collector:
            self._forward([_Stage(layer, place, replay) for place, layer in enumerate(self.layers)], batch)
        return collector.inputs

    def release(self) -> None:
        """Forget all weights."""
        for module in self.model.modules():
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                if parameter.device != _META:
                    setattr(module, leaf, nn.Parameter(parameter.to(_META), requires_grad=False))
        self._held = None
        give_back_memory()

    def _record(self, batch: Windows) -> tuple[Tensor, LayerArguments]:
        """Return the hidden states before the first layer, and each layer's other arguments."""
        recorded: LayerArguments = []
        seen: list[Tensor] = []

        def record(place: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            if place != len(recorded) or (seen and hidden is not seen[-1]):
                raise InputError(
                    "the model does more between its layers than to pass hidden states on",
                    file=self.checkpoint.source.folder / "config.json",
                    remedy="a method that needs no calibration, such as --method pissa",
                )
            recorded.append((args, kwargs))
            seen.append(hidden)
            self._entered = place == len(self.layers) - 1
            return hidden

        self._forward([_Stage(layer, place, record) for place, layer in enumerate(self.layers)], batch)
        self._entered = False
        if len(recorded) < len(self.layers):
            raise InputError(
                f"only {len(recorded)} of {len(self.layers)} layers are run by the model's forward",
                file=self.checkpoint.source.folder / "config.json",
                remedy="a method that needs no calibration, such as --method pissa",
            )
        return seen[0], recorded

    def _arguments_of(self, number: int) -> LayerArguments:
        with self._lock:
            if not self._arguments:  # on a cluster the text entered the model of another process
                for _ in self.forward_to_layers():
                    pass
        return self._arguments[number]

    def _forward(self, stages: Sequence[nn.Module], batch: Windows) -> None:
        whole = list(self.layers)
        try:
            for place, stage in enumerate(stages):
                self.layers[place] = stage
            with self._running():
                self.model(**{name: x.to(self.device) for name, x in batch.inputs.items()}, use_cache=False)
        except Enough:
            pass
        finally:
            for place, layer in enumerate(whole):
                self.layers[place] = layer

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

    # What targets are called with -------------------------------------------------------------------------------------

    @contextmanager
    def _collecting(self, batch: Windows, awaited: Sequence[str] = ()) -> Iterator[Collector]:
        counted = None if batch.counted is None else batch.counted.to(self.device)
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
        """Return the one list of layers that holds targets, and its name."""
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

    def load(self, module: nn.Module, name: str) -> None:
        """Give a module its own weights, on the device and in the working dtype, if it does not have them."""
        if self._entered and any(True for _ in module.parameters(recurse=False)):
            raise Enough  # the first module after the layers
        with self._lock:
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                if parameter.device != _META:
                    continue
                full = f"{name}.{leaf}" if name else leaf
                stored = self._stored.get(full)
                if stored is None or self.checkpoint.tensors[stored].shape != tuple(parameter.shape):
                    raise InputError(
                        f"the model's parameter {full} {list(parameter.shape)} is not in the checkpoint as it is",
                        file=self.checkpoint.source.folder,
                        tensor=stored or full,
                        remedy="a method that needs no calibration, such as --method pissa",
                    )
                value = read_to(self.device, self.checkpoint, stored).to(self.dtype)
                setattr(module, leaf, nn.Parameter(value, requires_grad=False))


class _Stage(nn.Module):
    """Stands for a layer, answers for it, and calls a function with what the layer would get."""

    def __init__(self, layer: nn.Module, place: int, call: Callable[..., Tensor]) -> None:
        super().__init__()
        object.__setattr__(self, "_layer", layer)
        self._place, self._call = place, call

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Call."""
        return self._call(self._place, hidden_states, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def _same_parameters(model: nn.Module) -> list[list[str]]:
    """Return the names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [several for several in names.values() if len(several) > 1]


def _modern(name: str) -> str:
    """Return what transformers makes of the names of BERT's first checkpoints."""
    return _GAMMA.sub("weight", _BETA.sub("bias", name))


def empty_model(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """Return the config's own model with parameters on the meta device and computed buffers on the CPU.

    Raises:
        InputError: transformers does not know it.
    """
    import transformers
    from accelerate import init_empty_weights  # type: ignore[import-untyped]

    folder = checkpoint.source.folder
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model_class = getattr(transformers, (config.architectures or [""])[0])
        with init_empty_weights(include_buffers=False):
            model = model_class._from_config(config, dtype=dtype)
        model.tie_weights()
    except Exception as error:  # whatever a config can make transformers raise
        raise InputError(
            f"transformers does not build the model: {str(error).splitlines()[0]}",
            file=folder / "config.json",
            remedy="give a model whose `architectures` transformers has",
        ) from error
    return model.eval().requires_grad_(False)
