"""Loading what basis wrote: `model, tokenizer = basiscli.load("m-kv0.6")`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from basiscli.checkpoints.kv_file import CONFIG_FILE, Prefill, read_kv_bases, read_kv_config
from basiscli.errors import InputError
from basiscli.hub.resolve import resolve
from basiscli.runtime.kv_projection import KVProjection, attach, attention_modules


def load(
    model: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    prefill: Prefill = "compressed",
) -> tuple[Any, Any]:
    """Load a model and its tokenizer; one that `basis compress` made uses its small KV cache.

    Whatever cache the model is given or makes for itself (growing, static, offloaded) holds coefficients, in `generate`
    and in plain forwards; forwards without a cache are cut in the same way.

    Args:
        model: a folder or a Hub id (`org/name@revision`); one without a KV projection is loaded as it is.
        dtype: of the weights; by default float32 on a CPU and the stored one elsewhere.
        device: where to; by default a GPU if there is one.
        prefill: how a prompt attends to itself: to what the cache holds of it ('compressed'), or to its whole keys and
            values ('exact'); the cache holds coefficients either way.

    Returns:
        The model in evaluation mode, and its tokenizer (None where the folder has none).

    Raises:
        InputError, HubError: as for every command.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = resolve(str(model)).folder
    kept = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    loaded = load_weights(folder, kept or (torch.float32 if place.type == "cpu" else "auto"), place)
    if read_kv_config(folder) is not None:
        projections = projections_of(folder)
        _check_shape(loaded, projections, folder)
        attach(loaded, projections)
        set_prefill(loaded, prefill)
    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    return loaded, load_tokenizer(folder) if any((folder / name).is_file() for name in files) else None


def projections_of(folder: Path) -> list[KVProjection]:
    """Return one projection a layer from a folder's two files."""
    found = read_kv_bases(folder)
    config = found.config
    return [
        KVProjection(keys, None if config.values_folded else values, key_ranks, value_ranks)
        for (keys, values), key_ranks, value_ranks in zip(
            found.bases, config.key_ranks, config.value_ranks, strict=True
        )
    ]


def _check_shape(model: Any, projections: Sequence[KVProjection], folder: Path) -> None:
    """Refuse bases of another model: bases of one head would fit any number of heads.

    Raises:
        InputError: the model has other layers or heads.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found, expected = (len(projections), *projections[0].key_basis.shape[:2]), (config.num_hidden_layers, heads, dim)
    if found != expected:
        bases, weights = ("{} layers with {} KV heads of {} dimensions".format(*shape) for shape in (found, expected))
        raise InputError(
            f"the KV projection is of another model: {bases}, and the model has {weights}",
            file=folder / CONFIG_FILE,
            remedy="make the folder again with `basis compress`",
        )


def set_prefill(model: Any, prefill: Prefill) -> None:
    """Choose how prompts attend to themselves; see `load`."""
    for module in attention_modules(model):
        module.kv_projection.exact_prefill = prefill == "exact"  # type: ignore[union-attr]


def load_weights(folder: Path, dtype: torch.dtype | str, device: torch.device) -> Any:
    """Load a causal language model for inference, without running code of the checkpoint and without guessing weights.

    On the meta device only its structure is made.

    Raises:
        InputError: transformers does not know it, or weights are missing.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with _quiet():
            if device.type == "meta":
                with device:
                    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                trust_remote_code=False,
                output_loading_info=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # refused below, with the tensor's name
            )
    except (ValueError, OSError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise InputError(
            f"transformers does not load it: {str(error).splitlines()[0]}",
            file=folder,
            remedy="give a causal language model that AutoModelForCausalLM loads",
        ) from error
    for name, stored, expected in sorted(info["mismatched_keys"], key=str):
        raise InputError(
            f"the checkpoint has {list(stored)}, and its config makes {list(expected)} of it",
            file=folder,
            tensor=name,
            remedy="restore the config.json that belongs to these weights",
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(
            f"{len(missing)} weights are missing in the checkpoint",
            file=folder,
            tensor=missing[0],
            remedy="download the checkpoint again",
        )
    return model.to(device).eval().requires_grad_(False)


def load_tokenizer(folder: Path) -> Any:
    """Load a folder's tokenizer.

    Raises:
        InputError: there is none, or it does not load.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise InputError(
            f"no tokenizer that loads: {str(error).splitlines()[0]}",
            file=folder,
            remedy="put the model's tokenizer beside its weights, or give tokens: --calibration tokens.safetensors",
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' bars and advice off the terminal."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
