"""Conversion of pickled and GGUF checkpoints to safetensors, kept in the cache.

Its cache key is the path, size and modification time of the original files.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from basiscli.checkpoints.cache import cache_folder, cached
from basiscli.checkpoints.files import read_json
from basiscli.checkpoints.source import Source, models_in
from basiscli.errors import BasisError, InputError, UsageError

if TYPE_CHECKING:
    import torch

_PICKLE_INDEX = "pytorch_model.bin.index.json"


def converted(source: Source) -> Path:
    """Return a folder with the source's weights in safetensors, converting them if the cache lacks them.

    For a GGUF file the folder also has the configuration and tokenizer that are in it; its weights become float32,
    which holds every GGUF type without rounding.

    Raises:
        InputError: there are no weights, or they cannot be read.
        UsageError: a `.gguf` file without the `gguf` extra installed.
    """
    files = _foreign_files(source.path)
    stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(repr(stamps).encode()).hexdigest()[:24]
    folder = cache_folder() / "converted" / f"{files[0].stem}-{key}"
    is_gguf = files[0].suffix == ".gguf"
    return cached(folder, lambda out: _convert_gguf(files[0], out) if is_gguf else _convert_pickles(files, out))


def load_pickle(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a pickled state dict by name, memory-mapped where its format allows; runs none of its code.

    Raises:
        InputError: the file is not a state dict, or needs code to be unpickled.
    """
    import torch

    try:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 cannot be mapped
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling foreign bytes fails in any way it likes
        raise InputError(
            f"not a state dict that can be read without running code: {str(error).splitlines()[0]}",
            file=file,
            remedy="ask its author for safetensors",
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items()
    ):
        raise InputError("not a table of tensors", file=file, remedy="ask its author for safetensors")
    return state


def _foreign_files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix in {".bin", ".pt", ".pth", ".gguf"}:
            return [path]
        raise InputError("not a .safetensors, .bin, .pt or .gguf file", file=path, remedy="give one of these")
    weight_map = read_json(path / _PICKLE_INDEX).get("weight_map", {})
    named = list(weight_map.values()) if isinstance(weight_map, dict) else []
    for name in named:
        if not isinstance(name, str) or name != Path(name).name or not (path / name).is_file():
            raise InputError(
                f"the index names '{name}', which is no file of this folder",
                file=path / _PICKLE_INDEX,
                remedy="download or save the checkpoint again",
            )
    names = sorted(set(named))
    for pattern in ("pytorch_model.bin", "adapter_model.bin"):
        names = names or sorted(file.name for file in path.glob(pattern))
    if not names:
        names = sorted(file.name for file in path.glob("*.gguf"))
        if len(names) > 1:
            raise InputError("several .gguf files", file=path, remedy="give the path of one of them")
    if not names:
        raise InputError(
            "no weights here: no .safetensors, pytorch_model.bin or .gguf",
            file=path,
            remedy=_give(path),
        )
    return [path / name for name in names]


def _give(folder: Path) -> str:
    """Return what to give instead of a folder without weights."""
    parts = [str(part) for part in models_in(folder) if part != folder]
    return f"give {' or '.join(parts)}" if parts else "give the folder of a checkpoint or an adapter"


def _convert_pickles(files: list[Path], out: Path) -> None:
    """Write one safetensors file a pickle; tensors that share their storage are aliases and are written once.

    The other files of the checkpoint stay where they are, and are read there.
    """
    from safetensors.torch import save_file

    seen: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    for number, file in enumerate(files, start=1):
        state = {}
        seen.clear()
        for name, tensor in load_pickle(file).items():
            place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
            if tensor.numel() and place in seen:
                continue
            seen[place] = name
            state[name] = tensor.contiguous().clone()
        name = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(state, out / name, metadata={"format": "pt"})


def _convert_gguf(file: Path, out: Path) -> None:
    try:
        import gguf  # noqa: F401 - transformers needs it and fails late without
    except ImportError as error:
        raise UsageError(
            f"reading {file.name} needs the gguf package", remedy="pip install 'basiscli[gguf]'"
        ) from error
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    print(f"converting {file.name} to safetensors (once; kept in {cache_folder()})", file=sys.stderr)  # noqa: T201
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        # save_pretrained would refuse: it takes the model for a quantised one.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(out)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)
    except BasisError:
        raise
    except Exception as error:  # whatever transformers and gguf raise on a bad or unsupported file
        raise InputError(f"transformers cannot read it: {error}", file=file) from error
