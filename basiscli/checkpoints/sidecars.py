"""Files beside the weights: configuration, tokenizer, chat template, licence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from basiscli.checkpoints.dtypes import DTYPES
from basiscli.checkpoints.files import REPORT, leads_out
from basiscli.checkpoints.views import Checkpoint
from basiscli.errors import InputError

_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".spm", ".tiktoken", ".bpe", ".vocab"}
_NAMES = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")
# Made anew, belonging to the weights, or the state of a training that the result did not have.
_NOT = {
    REPORT,
    "config.json",
    "kv_projection.json",
    "trainer_state.json",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
}
_TOKENIZER = {
    "added_tokens.json", "chat_template.jinja", "merges.txt", "special_tokens_map.json", "spiece.model",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
}  # fmt: skip
_MAX_BYTES = 100_000_000


def sidecar_files(
    reference: Checkpoint,
    dtype: str | None,
    *,
    code: bool,
    tokenizer: Mapping[str, bytes] | None = None,
    untied: bool = False,
) -> dict[str, bytes]:
    """Return the contents of the files to write beside a full checkpoint's weights, by name.

    Args:
        reference: the checkpoint to take them from.
        dtype: storage dtype to write into config.json ('BF16'); None to keep it.
        code: also copy `*.py` files, which are never run.
        tokenizer: files of a tokenizer that replaces the checkpoint's own.
        untied: whether the output head is on its own where the checkpoint ties it.
    """
    folder = reference.source.folder
    files = {file.name: _content(file) for file in sorted(folder.iterdir()) if _belongs(file, code=code)}
    for module in _sentence_transformers_folders(folder):
        files |= {f"{module.name}/{f.name}": _content(f) for f in sorted(module.iterdir()) if f.suffix == ".json"}
    if tokenizer is not None:
        files = {name: content for name, content in files.items() if name not in _TOKENIZER} | dict(tokenizer)
    if reference.config:
        config = _config(reference.config, dtype) | ({"tie_word_embeddings": False} if untied else {})
        if untied and isinstance(config.get("text_config"), dict):
            config = config | {"text_config": config["text_config"] | {"tie_word_embeddings": False}}
        files["config.json"] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    return files


def adapter_config(config: dict[str, Any], modules: list[str], rank: int, base: str | None) -> bytes:
    """Return the bytes of an `adapter_config.json` with one rank for every module and a scaling of 1.

    Args:
        config: the config of one of the adapters that were merged.
        modules: full names of the modules that have factors, as a list of suffixes may match too few or too many.
        rank: the rank of the written factors.
        base: the name of the base.
    """
    changed = config | {
        "base_model_name_or_path": base,
        "target_modules": sorted(modules),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
        "inference_mode": True,
        "bias": "none",
        "lora_bias": False,
        "modules_to_save": None,
    }
    return (json.dumps(changed, indent=2, sort_keys=True) + "\n").encode()


def _belongs(file: Path, *, code: bool) -> bool:
    if not file.is_file() or file.name in _NOT or file.name.endswith(".index.json"):
        return False
    if file.name.upper().startswith(_NAMES):
        return True
    wanted = _SUFFIXES | ({".py"} if code else set())
    return file.suffix in wanted and not file.name.startswith("adapter_") and file.stat().st_size <= _MAX_BYTES


def _content(file: Path) -> bytes:
    if leads_out(file):
        raise InputError("a link that leads out of the folder", file=file, remedy="put the file itself in its place")
    return file.read_bytes()


def _sentence_transformers_folders(folder: Path) -> list[Path]:
    """Return the sub-folders that a sentence-transformers model lists in `modules.json`, if they are inside it."""
    try:
        modules = json.loads((folder / "modules.json").read_text()) if (folder / "modules.json").is_file() else []
        names = [str(module["path"]) for module in modules if module.get("path")]
    except (ValueError, TypeError, KeyError, AttributeError):
        return []
    return [
        folder / name
        for name in names
        if name not in {"", ".", ".."} and name == Path(name).name and (folder / name).is_dir()
        if not leads_out(folder / name)
    ]


def _config(config: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    if dtype is None:
        return config
    name = str(DTYPES[dtype].torch_name)
    keys = [key for key in ("dtype", "torch_dtype") if config.get(key)] or ["dtype"]
    parts = {key: _with_dtype(part, name) for key, part in config.items() if isinstance(part, dict)}
    return config | parts | dict.fromkeys(keys, name)


def _with_dtype(part: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the configuration of a part, of text or of vision, with the dtype where it names one."""
    return part | {key: name for key in ("dtype", "torch_dtype") if part.get(key)}
