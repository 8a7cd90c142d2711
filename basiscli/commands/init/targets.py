"""Which weights an adapter is made for: `target_modules` as PEFT reads it, on the names of the loaded model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from basiscli.checkpoints.views import Checkpoint
from basiscli.errors import InputError, UsageError, did_you_mean
from basiscli.model.architecture import kinds, loaded_names
from basiscli.names import natural_key
from basiscli.transforms import Kind

ALL_LINEAR = "all-linear"
_HEADS = {"lm_head", "embed_out", "score", "classifier"}  # PEFT's all-linear leaves output layers alone, too


def find_targets(model: Checkpoint, wanted: str | Sequence[str]) -> dict[str, str]:
    """Return the weights that `target_modules` means, read as PEFT reads it, and their modules."""
    kind_of = kinds(model, model.tensors).by_name
    linear = [n for n, t in model.tensors.items() if kind_of[n] is Kind.LINEAR and n.endswith(".weight") and t.count]
    loaded = loaded_names(model, sorted(linear, key=natural_key))
    weights = {module.removesuffix(".weight"): name for name, module in loaded.items()}
    modules = list(weights)
    if not modules:
        raise InputError(
            "the checkpoint holds no linear layer", file=model.source.path, remedy="give the folder of a whole model"
        )
    leaves = {module.rpartition(".")[2] for module in modules}
    if wanted == ALL_LINEAR:
        chosen = [module for module in modules if module.rpartition(".")[2] not in _HEADS]
    elif isinstance(wanted, str):
        try:
            pattern = re.compile(wanted)
        except re.error as error:
            raise UsageError(
                f"--target-modules '{wanted}' is no regular expression: {error}",
                remedy=f"mend it, or give '{ALL_LINEAR}' or names out of {', '.join(sorted(leaves))}",
            ) from error
        chosen = [module for module in modules if pattern.fullmatch(module)]
    else:
        unknown = [word for word in wanted if not any(m == word or m.endswith(f".{word}") for m in modules)]
        if unknown:
            raise UsageError(f"no linear layer is called '{unknown[0]}'", remedy=did_you_mean(unknown[0], leaves))
        chosen = [m for m in modules if any(m == word or m.endswith(f".{word}") for word in wanted)]
    if not chosen:
        raise UsageError(
            f"--target-modules {wanted} matches no linear layer",
            remedy=f"'{ALL_LINEAR}', names out of {', '.join(sorted(leaves))}, or a regular expression for whole names",
        )
    return {weights[module]: module for module in chosen}


def in_model_order(model: Checkpoint, targets: Mapping[str, str]) -> dict[str, str]:
    """Return targets in the order of the model's modules: PEFT numbers trained values by it, and their files so, too.

    Names in their natural order are another order: q_proj, k_proj, v_proj is Llama's. The model is built without memory
    to ask, which imports transformers (seconds).

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
