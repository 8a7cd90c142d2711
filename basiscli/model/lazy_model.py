"""Models on the meta device whose modules read their weights from the checkpoint when they are first called."""

from __future__ import annotations

import re
import threading
from typing import Any

import torch
from torch import nn

from basiscli.checkpoints.transfer import read_to
from basiscli.checkpoints.views import Checkpoint
from basiscli.engine.devices import trim_memory
from basiscli.errors import InputError
from basiscli.model.names import loaded_names

_META = torch.device("meta")
_GAMMA, _BETA = re.compile(r"(?<=LayerNorm\.)gamma$"), re.compile(r"(?<=LayerNorm\.)beta$")


def empty_model(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """Return the model that a checkpoint's config names, with parameters on the meta device and buffers on the CPU.

    Raises:
        InputError: transformers cannot build it.
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


class LazyWeights:
    """Loads the weights of an empty model: each module's are read before its first forward and kept until `release`.

        model = empty_model(checkpoint, torch.bfloat16)
        weights = LazyWeights(model, checkpoint, device, torch.bfloat16)
        model.model.layers[0](hidden, …)  # reads this layer's weights
        weights.release()

    Threads may call modules at the same time.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        """Move the model's buffers to the device and register a forward pre-hook on each module.

        Args:
            model: made by `empty_model`.
            checkpoint: has its weights.
            device: what the model runs on.
            dtype: of the weights after loading.
        """
        self.model, self.checkpoint, self.device, self.dtype = model, checkpoint, device, dtype
        self._lock = threading.Lock()
        names = loaded_names(checkpoint, checkpoint.tensors)
        self._stored = {_modern(loaded): stored for stored, loaded in names.items()}
        for parameters in _same_parameters(model):  # tied weights are stored under one of their names
            stored = next((self._stored[name] for name in parameters if name in self._stored), None)
            self._stored |= dict.fromkeys(parameters, stored) if stored else {}
        for name, module in model.named_modules():
            for leaf, buffer in module.named_buffers(recurse=False):
                stored = self._stored.get(f"{name}.{leaf}")
                value = buffer if stored is None else checkpoint.read(stored).to(buffer.dtype)
                setattr(module, leaf, value.to(device))
            module.register_forward_pre_hook(lambda module, args, name=name: self._load_called(module, name))

    def release(self) -> None:
        """Put all parameters back on the meta device and free their memory."""
        with self._lock:
            for module in self.model.modules():
                for leaf, parameter in list(module.named_parameters(recurse=False)):
                    if parameter.device != _META:
                        setattr(module, leaf, nn.Parameter(parameter.to(_META), requires_grad=False))
        trim_memory()

    def load(self, module: nn.Module, name: str) -> None:
        """Load all weights in a module, also those that are read without their own module being called.

        torch's convolution takes a weight on the meta device without an error, and returns uninitialised memory.

        Args:
            module: of the model.
            name: as `named_modules()` has it.
        """
        for inner, part in module.named_modules():
            self._load(part, f"{name}.{inner}" if inner else name)

    def _load_called(self, module: nn.Module, name: str) -> None:
        self._load(module, name)
        if name:  # a whole model's head is not needed where its forward begins
            for leaf, child in module.named_children():
                if not any(True for _ in child.children()):
                    self._load(child, f"{name}.{leaf}")

    def _load(self, module: nn.Module, name: str) -> None:
        """Give a module its own weights, on the device and in the working dtype, if it does not have them."""
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


def _same_parameters(model: nn.Module) -> list[list[str]]:
    """Return the names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [several for several in names.values() if len(several) > 1]


def _modern(name: str) -> str:
    """Return what transformers makes of the names of BERT's first checkpoints."""
    return _GAMMA.sub("weight", _BETA.sub("bias", name))
