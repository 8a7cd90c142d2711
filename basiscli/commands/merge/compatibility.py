"""Checks before a merge that its models fit together: architectures, names, shapes, dtypes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from basiscli.checkpoints.adapter_view import Model
from basiscli.checkpoints.dtypes import DTYPES, is_quantised
from basiscli.checkpoints.header import TensorSpec
from basiscli.checkpoints.kv_file import CONFIG_FILE, read_kv_config
from basiscli.checkpoints.tied import same_bytes, show_head, tied_head, tied_pair
from basiscli.checkpoints.views import Checkpoint
from basiscli.errors import InputError
from basiscli.model.architecture import is_buffer, is_quantised_name, kind_by_name
from basiscli.transforms import Kind


@dataclass(frozen=True)
class TensorSort:
    """The reference's tensors by what a merge does with them."""

    merged: list[str]
    """Names of floating-point parameters."""
    copied: list[str]
    """Names of buffers and integer tensors, copied from the reference."""
    notes: list[str]
    """Notes for the report on missing, additional and tied tensors."""
    untied: bool = False
    """Whether an output head that the reference ties to its embedding is merged, and written, on its own."""


def check_architecture(reference: Checkpoint, models: Sequence[Model], *, trust_remote_code: bool) -> None:
    """Raise for models of different architectures, quantised ones, and ones with code in their repository.

    Raises:
        InputError: naming the model and its config.json.
    """
    for checkpoint in [reference, *(model for model in models if isinstance(model, Checkpoint))]:
        folder = checkpoint.source.folder
        if checkpoint.config.get("quantization_config"):
            raise InputError(
                f"{checkpoint.source.spec} is quantised: its codes cannot be added",
                file=folder / "config.json",
                remedy="give the unquantised checkpoint",
            )
        if "auto_map" in checkpoint.config and not trust_remote_code:
            raise InputError(
                f"{checkpoint.source.spec} asks for code from its repository (auto_map)",
                file=folder / "config.json",
                remedy="with --trust-remote-code its .py files are copied beside the result; basis never runs them",
            )
        projection = read_kv_config(folder)
        if projection is not None and projection.values_folded:
            raise InputError(
                f"{checkpoint.source.spec} has the bases of a KV projection folded into its weights (--fold-v)",
                file=folder / CONFIG_FILE,
                remedy="merge first, and compress the result; or give a result of `basis compress` without --fold-v",
            )
        for key in ("model_type", "architectures"):
            here, there = checkpoint.config.get(key), reference.config.get(key)
            if here and there and here != there:
                raise InputError(
                    f"different architectures: {checkpoint.source.spec} is {_words(here)}, "
                    f"{reference.source.spec} is {_words(there)}",
                    file=folder / "config.json",
                    remedy="merge models of one architecture",
                )


def sort_tensors(reference: Checkpoint, models: Sequence[Model], *, allow_missing: bool) -> TensorSort:
    """Return which of the reference's tensors are merged and which copied; other names are left out.

    Raises:
        InputError: shapes differ; a parameter is missing in a model, or is in a model only (unless allowed); packed or
            quantised weights.
    """
    merged: list[str] = []
    copied: list[str] = []
    notes: list[str] = []
    tied = tied_head(reference)
    pair = tied_pair(reference.config, reference.tensors) if tied else None
    changed = [model.source.label for model in models if pair and _unties(model, *pair)]
    if tied and changed:
        _refuse_scaled_head(reference, tied, changed)
        notes.append(f"{tied} is tied to the embedding, and changed by {', '.join(changed)}: it is written on its own")
        for model in models:
            show_head(model, tied)
        tied = None
    elif tied:
        notes.append(f"{tied} is tied to the embedding and counted once")
    for name, tensor in reference.tensors.items():
        if name == tied:
            continue
        _refuse_quantised(tensor, tensor.file)
        lacking = [model for model in models if name not in model.tensors]
        is_copied = not DTYPES[tensor.dtype].floating or is_buffer(tensor)
        for model in models:
            if model not in lacking:
                _check_shape(tensor, reference, model)
        if lacking:
            who = ", ".join(model.source.label for model in lacking)
            if not (is_copied or allow_missing):
                raise InputError(
                    f"{who} lacks a parameter that {reference.source.spec} has",
                    file=lacking[0].source.path,
                    tensor=name,
                    remedy="give the complete checkpoint, or --allow-missing to count it as unchanged",
                )
            notes.append(f"{name} is missing in {who}: taken from {reference.source.label}")
        (copied if is_copied else merged).append(name)
    for model in models:
        _refuse_nothing_in_common(reference, model, merged)
    notes += [note for model in models for note in _notes_on_extras(reference, model, allow_missing=allow_missing)]
    return TensorSort(merged, copied, notes, untied=bool(changed))


def _refuse_nothing_in_common(reference: Checkpoint, model: Model, merged: Sequence[str]) -> None:
    """Raise for a model that has no parameter of the reference's names, with --allow-missing, too."""
    if not merged or any(name in model.tensors for name in merged):
        return
    own, prefix = next(iter(model.tensors), ""), ""
    for name in merged:
        if own.endswith(f".{name}") or name.endswith(f".{own}"):
            prefix = f": its names have {max(own, name, key=len)!r} where the other's have {min(own, name, key=len)!r}"
    raise InputError(
        f"{model.source.spec} has no tensor with a name of {reference.source.spec}{prefix}",
        file=model.source.path,
        tensor=own or None,
        remedy="give models of one architecture, saved under the same names",
    )


def _unties(model: Model, head: str, embedding: str) -> bool:
    """Return whether a model's output head is no longer its embedding."""
    if not isinstance(model, Checkpoint):
        return model.changes(head) and not model.keeps_tied(head, embedding)
    one, other = model.tensors.get(head), model.tensors.get(embedding)
    return one is not None and other is not None and not same_bytes(one, other)


def _refuse_scaled_head(reference: Checkpoint, head: str, changed: Sequence[str]) -> None:
    """Raise for an encoder-decoder: T5 scales what goes into a head only where it is tied."""
    if reference.config.get("is_encoder_decoder"):
        raise InputError(
            f"{', '.join(changed)} changes the output head that {reference.source.spec} ties to its embedding",
            file=reference.source.folder / "config.json",
            tensor=head,
            remedy="an encoder-decoder whose head is not tied is another model: leave that adapter or model out",
        )


def _notes_on_extras(reference: Checkpoint, model: Model, *, allow_missing: bool) -> list[str]:
    notes: list[str] = []
    extras = [name for name in model.tensors if name not in reference.tensors]
    if not extras:
        return notes
    tied = tied_head(model) if isinstance(model, Checkpoint) else None
    for name in extras:
        tensor = model.tensors[name]
        is_parameter = DTYPES[tensor.dtype].floating and not is_buffer(tensor) and name != tied
        if is_parameter and not allow_missing:
            raise InputError(
                f"{model.source.spec} has a parameter that {reference.source.spec} lacks",
                file=model.source.path,
                tensor=name,
                remedy="give models of one kind, or --allow-missing to leave it out",
            )
        _refuse_quantised(tensor, model.source.path)
        notes.append(f"{name} is only in {model.source.label}: left out")
    return notes


def _check_shape(tensor: TensorSpec, reference: Checkpoint, model: Model) -> None:
    other = model.tensors[tensor.name]
    _refuse_quantised(other, model.source.path)
    if other.shape == tensor.shape:
        return
    has_vocabulary = kind_by_name(tensor) is Kind.EMBEDDING or ".lm_head." in f".{tensor.name}"
    rows_only = has_vocabulary and other.shape[1:] == tensor.shape[1:]
    raise InputError(
        f"shapes differ: {list(other.shape)} in {model.source.spec}, {list(tensor.shape)} in {reference.source.spec}",
        file=model.source.path,
        tensor=tensor.name,
        remedy="the vocabularies differ: resize one model's embeddings to the other's tokenizer first"
        if rows_only
        else "give models of one size and architecture",
    )


def _refuse_quantised(tensor: TensorSpec, file: Path) -> None:
    packed = not DTYPES[tensor.dtype].floating and is_quantised_name(tensor) and len(tensor.shape) > 1
    if is_quantised(tensor.dtype) or packed:
        raise InputError(
            f"the tensor holds quantised weights ({tensor.dtype})",
            file=file,
            tensor=tensor.name,
            remedy="give the unquantised checkpoint",
        )


def _words(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def common_dtype_notes(reference: Checkpoint, models: Sequence[Model], tensors: Mapping[str, TensorSpec]) -> list[str]:
    """Return one note for each model whose storage dtype differs from the reference's."""
    notes = []
    for model in models:
        others = {model.tensors[n].dtype for n in tensors if n in model.tensors} - {t.dtype for t in tensors.values()}
        if others:
            notes.append(
                f"{model.source.label} stores {', '.join(sorted(others))}: the result has {reference.source.label}'s"
            )
    return notes
