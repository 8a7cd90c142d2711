"""What every stored tensor is in the model that transformers loads from a checkpoint.

Files hold one set of names, the loaded model another: transformers renames (`language_model.model.…` became
`model.language_model.…`), fuses (an expert's matrices into one stack), splits and transposes on the way, and the module
of a parameter may be no linear layer at all (a router), or one whose weight is read without the module being called
(`nn.MultiheadAttention.out_proj`). None of that can be read off the names. It is asked of transformers itself: of its
conversion mapping, applied to the stored names, and of the config's own model on the meta device.

Building costs seconds, so the answer is kept in the cache, by the digest of configuration, names and shapes; and it is
not needed where the names of a plain decoder say everything (`names_say_everything`).
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from basiscli.checkpoints.cache import cache_folder, cached
from basiscli.checkpoints.digests import digest
from basiscli.transforms import Kind
from basiscli.version import __version__

if TYPE_CHECKING:
    from torch import nn

    from basiscli.checkpoints.views import Checkpoint

# Families whose files have the loaded model's names and nothing fused; a test asks transformers for each.
PLAIN = frozenset(
    {
        "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "cohere", "olmo2",
        "stablelm", "starcoder2", "smollm3", "granite", "opt", "glm4",
    }
)  # fmt: skip
_WHOLE = {"model", "lm_head"}
"""What the names of a whole causal language model begin with."""


@dataclass(frozen=True)
class Part:
    """What a stored tensor is in the loaded model."""

    parameter: str
    """As `named_parameters()` or `named_buffers()` has it; of a fused one, the whole's name."""
    kind: Kind
    module_class: str
    """Class of the module that holds it: 'Linear', 'Conv1D', 'Embedding', 'MixtralTopKRouter'…"""
    is_whole: bool
    """Whether it is the parameter as it is, not a part of a fused one, split or turned."""
    is_called: bool
    """Whether the module is called with what its weight is multiplied with, so that hooks and LoRA see it."""
    modules: tuple[str, ...]
    """Every module that has it, by name; several share a tied weight."""

    @property
    def is_linear(self) -> bool:
        """Whether it is the weight of a linear layer, whole, that one called module has: what a LoRA can be put on."""
        return self.kind is Kind.LINEAR and self.is_whole and self.is_called and len(self.modules) == 1

    @property
    def is_transposed(self) -> bool:
        """Whether a linear weight is stored as [in, out], as GPT-2's Conv1D does."""
        return self.module_class == "Conv1D"


def names_say_everything(checkpoint: Checkpoint) -> bool:
    """Return whether a checkpoint is of a plain decoder in its own names: then stored and loaded names are the same."""
    architecture = str((checkpoint.config.get("architectures") or [""])[0])
    plain = checkpoint.config.get("model_type") in PLAIN and architecture.endswith("ForCausalLM")
    return plain and all(name.partition(".")[0] in _WHOLE for name in checkpoint.tensors)


def parts_of(checkpoint: Checkpoint) -> Mapping[str, Part] | None:
    """Return what each stored tensor is in the loaded model, by its stored name.

    Tensors that are no part of the model (layers of multi-token prediction, stale buffers) are left out.

    Returns:
        None where transformers does not build the model: names are then all there is to go by.
    """
    facts = [
        checkpoint.config, sorted((t.name, list(t.shape)) for t in checkpoint.tensors.values()), __version__,
        _transformers_version(),
    ]  # fmt: skip
    name = digest([json.dumps(facts, sort_keys=True, default=str).encode()])
    folder = cache_folder() / "names" / name
    try:
        return _read(folder)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # not there, or damaged
        parts = _parts(checkpoint)
    if parts is not None:  # or a package that is missing today would be missed for ever
        with suppress(OSError):  # a cache that cannot be written is none
            shutil.rmtree(folder, ignore_errors=True)
            cached(folder, lambda place: _write(place, parts))
    return parts


def parts_if_needed(checkpoint: Checkpoint) -> Mapping[str, Part] | None:
    """Return `parts_of` a checkpoint; None where the stored names say everything, or nobody knows more than they do."""
    return None if names_say_everything(checkpoint) else parts_of(checkpoint)


def found_by(checkpoint: Checkpoint) -> Literal["names", "model"]:
    """Return whether names alone say what its tensors are, or the model that transformers builds: for reports."""
    return "names" if parts_if_needed(checkpoint) is None else "model"


def loaded_names(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, str]:
    """Return what the loaded model calls stored tensors, by stored name: what PEFT will call them.

    A tensor that is part of a fused one, or of nothing, keeps its stored name.
    """
    as_stored = {name: name for name in names}
    parts = parts_if_needed(checkpoint)
    if parts is None:
        return as_stored
    return {name: parts[name].parameter if name in parts and parts[name].is_whole else name for name in as_stored}


def _transformers_version() -> str:
    from importlib.metadata import version

    return version("transformers")


def _write(folder: Path, parts: Mapping[str, Part]) -> None:
    (folder / "parts.json").write_text(json.dumps({name: asdict(part) for name, part in parts.items()}))


def _read(folder: Path) -> Mapping[str, Part]:
    table = json.loads((folder / "parts.json").read_text())
    return {
        name: Part(**(one | {"kind": Kind(one["kind"]), "modules": tuple(one["modules"])}))
        for name, one in table.items()
    }


# What transformers says -----------------------------------------------------------------------------------------------


def _parts(checkpoint: Checkpoint) -> Mapping[str, Part] | None:
    model = meta_model(checkpoint)
    if model is None:
        return None
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    state = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    holders = _holders(model)
    found: dict[str, Part] = {}
    for name in sorted(checkpoint.tensors, key=_natural):
        parameter, fused = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if parameter not in state:
            continue
        whole = fused is None and tuple(state[parameter].shape) == checkpoint.tensors[name].shape
        found[name] = _part(model, parameter, holders, is_whole=whole)
    return found


def meta_model(checkpoint: Checkpoint) -> Any:
    """Return the config's own model without memory; None where transformers does not know it."""
    classes = checkpoint.config.get("architectures") or []
    if not classes or "auto_map" in checkpoint.config:
        return None
    import torch
    import transformers

    model_class = getattr(transformers, str(classes[0]), None)
    if model_class is None:
        return None
    try:
        with _quiet_transformers(), torch.device("meta"):
            config = transformers.AutoConfig.from_pretrained(checkpoint.source.folder, trust_remote_code=False)
            model = model_class(config)
            model.tie_weights()
    except Exception:  # whatever a config can make transformers raise: names decide, and the report says so
        return None
    return model


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep advice about a model that nobody will run off the terminal."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


def _holders(model: nn.Module) -> dict[int, list[str]]:
    """Return the names of the modules that have a parameter, by its id."""
    found: dict[int, list[str]] = {}
    for module_name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            found.setdefault(id(parameter), []).append(module_name)
    return found


def _part(model: nn.Module, parameter: str, holders: Mapping[int, list[str]], *, is_whole: bool) -> Part:
    from torch import nn

    owner, _, leaf = parameter.rpartition(".")
    module = model.get_submodule(owner)
    value = getattr(module, leaf, None)
    parent = model.get_submodule(owner.rpartition(".")[0]) if owner else model
    is_called = not isinstance(parent, nn.MultiheadAttention) and not _reads_weights_of(parent, owner)
    modules = tuple(holders.get(id(value), [owner]))
    return Part(parameter, _kind(module, leaf), type(module).__name__, is_whole, is_called, modules)


def _reads_weights_of(parent: nn.Module, name: str) -> bool:
    """Return whether a module multiplies with a child's weight without calling the child, as Mamba's mixers do."""
    return hasattr(parent, "A_log") and name.rpartition(".")[2] in {"out_proj", "x_proj", "dt_proj"}


def _kind(module: nn.Module, leaf: str) -> Kind:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if leaf in dict(module.named_buffers(recurse=False)):
        return Kind.BUFFER
    if leaf == "bias" or leaf.endswith("_bias"):
        return Kind.BIAS
    if isinstance(module, Conv1D) or (isinstance(module, nn.Linear) and _maps_like_linear(module)):
        return Kind.LINEAR
    if isinstance(module, nn.Embedding):
        return Kind.EMBEDDING
    if isinstance(module, nn.modules.conv._ConvNd):
        return Kind.CONV
    return Kind.NORM if "norm" in type(module).__name__.lower() else Kind.OTHER


def _maps_like_linear(module: nn.Linear) -> bool:
    """Return whether a layer makes outputs of inputs as a linear layer does; Llama 4's router returns scores."""
    import torch
    from torch import nn

    if type(module).forward is nn.Linear.forward:
        return True
    try:
        outputs = module(torch.empty(1, module.in_features, dtype=module.weight.dtype, device=module.weight.device))
    except Exception:  # a layer that groups or routes its inputs wants others
        return False
    return isinstance(outputs, torch.Tensor) and outputs.shape == (1, module.out_features)


def _natural(name: str) -> list[Any]:
    return [int(word) if word.isdigit() else word for word in re.split(r"(\d+)", name)]
