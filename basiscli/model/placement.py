"""Whether PEFT finds a place for every tensor of an adapter, tried on a model without memory.

PEFT takes names to modules by rules of its own, and for mixtures of experts it rewrites both the configuration and the
tensors. An adapter that it cannot place loads with a warning, and computes something else. So before one is written,
PEFT itself loads its names and shapes onto the config's own model on the meta device.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from basiscli.checkpoints.header import TensorSpec
from basiscli.checkpoints.views import Checkpoint
from basiscli.errors import InputError
from basiscli.model.names import meta_model, parts_of

_MARK = ".default"  # the adapter's name, which PEFT puts into the names of its parameters


def unplaced(
    checkpoint: Checkpoint, config: Mapping[str, Any], tensors: Mapping[str, Sequence[TensorSpec]]
) -> list[str]:
    """Return the modules of a LoRA adapter that PEFT has no place for on the model of a checkpoint.

    Args:
        checkpoint: the adapter's base.
        config: `adapter_config.json`.
        tensors: names and shapes of `adapter_model.safetensors`, by module.

    Returns:
        Names of modules; none where transformers does not build the model, and PEFT cannot be asked.

    Raises:
        InputError: PEFT refuses the configuration, or the shapes.
    """
    model = meta_model(checkpoint)
    if model is None:
        return []
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.utils import set_peft_model_state_dict

    fields = {name: value for name, value in config.items() if name in LoraConfig.__dataclass_fields__}
    names = {spec.name: torch.empty(spec.shape, device="meta") for specs in tensors.values() for spec in specs}
    try:
        with _quiet():
            adapted = get_peft_model(model, LoraConfig(**fields), low_cpu_mem_usage=True)
            result = set_peft_model_state_dict(adapted, dict(names), low_cpu_mem_usage=True)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise InputError(
            f"PEFT does not place the adapter on the model: {str(error).splitlines()[0]}",
            file=checkpoint.source.path,
            remedy="choose the modules with --target-modules",
        ) from error
    lost = {key.replace(_MARK, "") for key in (*result.unexpected_keys, *result.missing_keys)}
    parts = parts_of(checkpoint) or {}
    stacks = tuple(adapted.peft_config["default"].target_parameters or ())

    def is_lost(module: str, specs: Sequence[TensorSpec]) -> bool:
        part = parts.get(f"{module}.weight")  # a matrix of an expert has its stored name
        in_no_stack = part is not None and not part.is_whole and not part.parameter.endswith(stacks)
        return in_no_stack or any(spec.name in lost for spec in specs)

    return [module for module, specs in tensors.items() if is_lost(module, specs)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep advice about a model that nobody will run off the terminal."""
    logger = logging.getLogger("peft")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
