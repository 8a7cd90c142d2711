"""Running a transformer layer by layer from its shards: what stays in memory is one layer and the hidden states."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from basiscli.calibration.tokens import Windows
from basiscli.checkpoints.architecture import loaded_names
from basiscli.checkpoints.views import Checkpoint
from basiscli.engine.devices import free_at_once, ran_out_of_memory
from basiscli.engine.local import Progress
from basiscli.engine.tensor_reader import is_finite
from basiscli.errors import InputError
from basiscli.transforms import InputMoments

_BATCH_TOKENS = 2048
_CHUNK = 2048  # rows whose products are summed in float32 before they join the float64 sum
_BAND = 512  # rows of a second moment that are added to at once
_META = torch.device("meta")
_GAMMA, _BETA = re.compile(r"(?<=LayerNorm\.)gamma$"), re.compile(r"(?<=LayerNorm\.)beta$")


class _Enough(BaseException):
    """Ends a forward whose rest is not wanted; no module's `except Exception` may catch it."""


@dataclass
class LayerwiseModel:
    """A model on the meta device whose modules read their weights when they are first called.

    `moments` runs the calibration text through it, one layer at a time: all windows pass a layer before the next one is
    loaded. The arguments of every layer (masks, rotary angles) are what the model's own forward hands to it, recorded
    with layers that pass on what they get: so no architecture's forward is written again here.
    """

    checkpoint: Checkpoint
    targets: Sequence[str]
    """Modules whose inputs are wanted, by the names of the loaded model."""
    windows: Windows
    device: torch.device
    dtype: torch.dtype
    model: Any = field(init=False)
    _stored: dict[str, str] = field(init=False)
    _hidden: list[Tensor] = field(default_factory=list)
    _entered: bool = False
    """Whether a forward has passed all layers and the rest of it is not wanted."""
    _arguments: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        free_at_once()
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

    def moments(self, progress: Progress) -> Iterator[dict[str, InputMoments]]:
        """Yield the inputs' moments of targets by module name, one layer after another.

        Targets that read the same tensor share one object. Targets outside the layers come first or last, with those
        that run before the layers and after them.

        Raises:
            InputError: a model that cannot be run so, or weights that are missing or give NaN.
        """
        folder = self.checkpoint.source.folder
        path, layers = self._layers()
        batches = self._batches()
        inside = [
            [name for name in self.targets if name.startswith(f"{path}.{place}.")] for place in range(len(layers))
        ]
        outside = [name for name in self.targets if not name.startswith(f"{path}.")]
        size = sum(batch.ids.numel() for batch in batches)
        progress.start("reading inputs", len(layers), len(layers) * size, "tokens")
        with torch.no_grad():
            with self._collecting(outside) as early:
                for batch in batches:
                    early.counted = self._counted(batch)
                    self._enter(layers, batch)
            self._release(self.model)  # embeddings, most of all
            if early.found:
                yield early.moments(folder)
            for place, wanted in enumerate(inside):
                with self._collecting(wanted) as collector:
                    for number, batch in enumerate(batches):
                        collector.counted = self._counted(batch)
                        self._hidden[number] = self._through(layers[place], place, number)
                        progress.advance(batch.ids.numel())
                self._release(layers[place])
                if not all(is_finite(hidden) for hidden in self._hidden):
                    raise InputError(
                        f"layer {place} gives NaN or Inf on the calibration text",
                        file=folder,
                        remedy="check the model with `basis eval`, or give a sound checkpoint",
                    )
                if wanted:
                    found = collector.moments(folder)
                    del collector  # one layer's moments at a time: those of a wide layer are gigabytes
                    yield found
                    del found
            late = [name for name in outside if name not in early.found]
            if late:
                with self._collecting(late) as collector:
                    for number, batch in enumerate(batches):
                        collector.counted, collector.awaited = self._counted(batch), set(late)
                        self._leave(layers, batch, number)
                if collector.found:
                    yield collector.moments(folder)

    # The passes -------------------------------------------------------------------------------------------------------

    def _enter(self, layers: nn.ModuleList, batch: Windows) -> None:
        """Run what comes before the layers; keep the hidden states and each layer's other arguments."""
        recorded: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
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
            self._entered = place == len(layers) - 1
            return hidden

        self._forward(layers, [_Stage(layer, place, record) for place, layer in enumerate(layers)], batch)
        self._entered = False
        if len(recorded) < len(layers):
            raise InputError(
                f"only {len(recorded)} of {len(layers)} layers are run by the model's forward",
                file=self.checkpoint.source.folder / "config.json",
                remedy="a method that needs no calibration, such as --method pissa",
            )
        self._hidden.append(seen[0])
        self._arguments.append(recorded)

    def _through(self, layer: nn.Module, place: int, number: int) -> Tensor:
        args, kwargs = self._arguments[number][place]
        with self._running():
            out = layer(self._hidden[number], *args, **kwargs)
        hidden: Tensor = out[0] if isinstance(out, tuple) else out
        return hidden

    def _leave(self, layers: nn.ModuleList, batch: Windows, number: int) -> None:
        """Run what comes after the layers, from the last hidden states on."""

        def replay(place: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            return self._hidden[number]

        self._forward(layers, [_Stage(layer, place, replay) for place, layer in enumerate(layers)], batch)

    def _forward(self, layers: nn.ModuleList, stages: Sequence[nn.Module], batch: Windows) -> None:
        whole = list(layers)
        try:
            for place, stage in enumerate(stages):
                layers[place] = stage
            with self._running():
                self.model(**{name: x.to(self.device) for name, x in batch.inputs.items()}, use_cache=False)
        except _Enough:
            pass
        finally:
            for place, layer in enumerate(whole):
                layers[place] = layer

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Say what is wrong with a model whose forward fails: its config and its weights do not fit, mostly."""
        config, length = self.model.config.get_text_config(), self.windows.ids.shape[1]
        positions = getattr(config, "max_position_embeddings", None)
        try:
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
            raise _Enough  # the first module after the layers
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
            value = self.checkpoint.read(stored).to(self.device, self.dtype)
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))

    def _release(self, layer: nn.Module) -> None:
        for module in layer.modules():
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, leaf, nn.Parameter(parameter.to(_META), requires_grad=False))

    # Batches ----------------------------------------------------------------------------------------------------------

    def _batches(self) -> list[Windows]:
        count = max(1, _BATCH_TOKENS // self.windows.ids.shape[1])
        return [self.windows.select(places.tolist()) for places in torch.arange(len(self.windows)).split(count)]

    def _counted(self, batch: Windows) -> Tensor | None:
        return None if batch.counted is None else batch.counted.to(self.device)

    @contextmanager
    def _collecting(self, names: Sequence[str]) -> Iterator[_Collector]:
        collector = _Collector()
        hooks = [self.model.get_submodule(name).register_forward_pre_hook(collector.hook(name)) for name in names]
        try:
            yield collector
        finally:
            for hook in hooks:
                hook.remove()


class _Collector:
    """Adds up the moments of what modules are called with."""

    def __init__(self) -> None:
        self.counted: Tensor | None = None
        """Which tokens count [windows, tokens]; None for all."""
        self.awaited: set[str] = set()
        """Modules after whose calls the forward is ended; with none it is not."""
        self.found: dict[str, _Sums] = {}
        self._last: tuple[Tensor, _Sums] | None = None

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """Return a forward pre-hook for a module."""

        def add(module: nn.Module, args: tuple[Any, ...]) -> None:
            given = args[0]
            if self._last is not None and given is self._last[0] and self.found.get(name) in (None, self._last[1]):
                self.found[name] = self._last[1]  # the same tensor as its neighbour's: q, k and v
            else:
                sums = self.found.setdefault(name, _Sums())
                sums.add(self._rows(given))
                self._last = given, sums
            if self.awaited:
                self.awaited.discard(name)
                if not self.awaited:
                    raise _Enough

        return add

    def moments(self, folder: Path) -> dict[str, InputMoments]:
        """Return what was found; modules that read the same tensors share one object.

        Raises:
            InputError: NaN or Inf among it.
        """
        for name, sums in self.found.items():
            if not is_finite(sums.second):
                raise InputError(
                    "what this layer gets from the calibration text holds NaN or Inf",
                    file=folder,
                    tensor=f"{name}.weight",
                    remedy="check the model with `basis eval`, or give a sound checkpoint",
                )
        distinct = {id(sums): sums.moments() for sums in self.found.values()}
        return {name: distinct[id(sums)] for name, sums in self.found.items()}

    def _rows(self, given: Tensor) -> Tensor:
        if self.counted is not None and given.dim() == 3 and given.shape[:2] == self.counted.shape:
            return given[self.counted]
        if self.counted is not None and given.dim() == 2 and given.shape[0] == self.counted.numel():
            return given[self.counted.flatten()]
        return given.flatten(0, -2)  # one row a window (a pooler), or tokens that a router chose


class _Sums:
    """Second moments about the first rows' mean, so that a large mean takes no digits from them."""

    def __init__(self) -> None:
        self.count = 0
        self.shift = self.total = self.second = torch.zeros(0)

    def add(self, rows: Tensor) -> None:
        """Add rows [n, d]."""
        if not len(rows):
            return
        if not self.count:
            self.shift = rows.double().mean(0)
            self.total = torch.zeros_like(self.shift)
            self.second = torch.zeros(len(self.shift), len(self.shift), dtype=torch.float64, device=rows.device)
        for part in rows.split(_CHUNK):
            moved = part.float() - self.shift.float()
            self.total += moved.sum(0, dtype=torch.float64)
            for first, last in _bands(len(self.shift)):
                self.second[first:last, first:] += moved[:, first:last].mT @ moved[:, first:]
        self.count += len(rows)

    def moments(self) -> InputMoments:
        """Return them; nothing is to be added afterwards."""
        for first, last in _bands(len(self.shift)):
            self.second[last:, first:last] = self.second[first:last, last:].mT
        return InputMoments(self.count, self.shift.float().double(), self.total, self.second)


def _bands(width: int) -> Iterator[tuple[int, int]]:
    """Yield bands of rows of a symmetric matrix, whose upper half is enough.

    The product of one band is all the memory that adding takes beside the sum itself.
    """
    for first in range(0, width, _BAND):
        yield first, min(first + _BAND, width)


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
