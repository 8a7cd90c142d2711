"""Which weights an adapter is made for: `target_modules` as PEFT reads it, on the names of the loaded model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from basiscli.checkpoints.views import Checkpoint
from basiscli.errors import InputError, UsageError, did_you_mean
from basiscli.model.architecture import kinds
from basiscli.model.names import parts_if_needed
from basiscli.names import natural_key
from basiscli.transforms import Kind

ALL_LINEAR = "all-linear"
_EXPERT = re.compile(r"\.experts\.\d+\.")
_HEADS = {"lm_head", "embed_out", "score", "classifier"}  # PEFT's all-linear leaves output layers alone, too


def find_targets(model: Checkpoint, wanted: str | Sequence[str]) -> dict[str, str]:
    """Return the modules that `target_modules` selects, read as PEFT reads it, by the names of their weights.

    Args:
        model: whose linear layers there are to select from.
        wanted: 'all-linear' for all but output heads; a regular expression for whole names of modules; or a list of
            names, of which each is a module's or ends it ('q_proj').

    Raises:
        InputError: the checkpoint holds no linear layer.
        UsageError: nothing is selected, a name in the list selects nothing, or the expression is none.
    """
    weights = {module: name for name, module in _linear_modules(model).items()}
    if not weights:
        raise InputError(
            "the checkpoint holds no linear layer", file=model.source.path, remedy="give the folder of a whole model"
        )
    leaves = sorted({_leaf(module) for module in weights})
    if wanted == ALL_LINEAR:
        chosen = [module for module in weights if _HEADS.isdisjoint(module.split("."))]
    elif isinstance(wanted, str):
        chosen = _matching(list(weights), wanted, leaves)
    else:
        chosen = _named(list(weights), wanted, leaves)
    if not chosen:
        raise UsageError(
            f"--target-modules {wanted} matches no linear layer",
            remedy=f"'{ALL_LINEAR}', names out of {', '.join(leaves)}, or a regular expression for whole names",
        )
    return {weights[module]: module for module in chosen}


def _linear_modules(model: Checkpoint) -> dict[str, str]:
    """Return the modules that a LoRA can be put on, by the names of their weights, in their natural order.

    A matrix of an expert that is stored on its own counts, by its stored name: PEFT takes it to the stack that
    transformers fuses the experts' matrices into.
    """
    kind_of = kinds(model, model.tensors).by_name
    matrices = [t.name for t in model.tensors.values() if t.name.endswith(".weight") and len(t.shape) == 2 and t.count]
    parts = parts_if_needed(model)
    if parts is None:
        found = {name: name for name in matrices if kind_of[name] is Kind.LINEAR}
    else:
        found = {name: parts[name].parameter for name in matrices if name in parts and parts[name].is_linear}
        experts = (name for name in matrices if name in parts and not parts[name].is_whole and _EXPERT.search(name))
        found |= {name: name for name in experts if kind_of[name] is Kind.LINEAR}
    return {name: found[name].removesuffix(".weight") for name in sorted(found, key=natural_key)}


def _leaf(module: str) -> str:
    """Return the last part of a module's name."""
    return module.rpartition(".")[2]


def _matching(modules: Sequence[str], expression: str, leaves: Sequence[str]) -> list[str]:
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise UsageError(
            f"--target-modules '{expression}' is no regular expression: {error}",
            remedy=f"mend it, or give '{ALL_LINEAR}' or names out of {', '.join(leaves)}",
        ) from error
    return [module for module in modules if pattern.fullmatch(module)]


def _named(modules: Sequence[str], names: Sequence[str], leaves: Sequence[str]) -> list[str]:
    def is_meant(module: str, name: str) -> bool:
        return module == name or module.endswith(f".{name}")

    for name in names:
        if not any(is_meant(module, name) for module in modules):
            raise UsageError(f"no linear layer is called '{name}'", remedy=did_you_mean(name, leaves))
    return [module for module in modules if any(is_meant(module, name) for name in names)]


def in_model_order(model: Checkpoint, targets: Mapping[str, str]) -> dict[str, str]:
    """Return the same targets in the order of the model's `named_modules()`, by which PEFT's TinyLoRA numbers vectors.

    Names in their natural order are another order: q_proj, k_proj, v_proj is Llama's. The model is built on the meta
    device to ask, which imports transformers (seconds).

    Raises:
        InputError: transformers does not build the model, or its modules are not those of the checkpoint.
    """
    import torch

    from basiscli.model.lazy_model import empty_model

    by_module = {module: name for name, module in targets.items()}
    modules = [module for module, _ in empty_model(model, torch.float32).named_modules()]
    missing = by_module.keys() - {*modules}
    if missing:
        raise InputError(
            f"the loaded model has no module {min(missing, key=natural_key)}: its class fuses some of the weights",
            file=model.source.path,
            remedy="leave it out with --target-modules",
        )
    return {by_module[module]: module for module in modules if module in by_module}
