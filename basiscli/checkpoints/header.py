"""Reading, checking and writing of safetensors headers.

The format: eight bytes with the header's length (little endian), a JSON object `name → {dtype, shape, data_offsets}`,
then the bytes of the tensors without holes. Reading it here, without mapping the file, has three reasons: `inspect`
and `--dry-run` need no torch; pages of a mapped file count as memory of the process, so that a merge would seem to
(and, in a container, does) grow with the model; and a file cut short while it is mapped ends the process with SIGBUS
instead of an error that names it.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from basiscli.checkpoints.dtypes import DTYPES, tensor_bytes
from basiscli.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
_REFETCH = "download or save the file again"
_LFS = b"version "  # as every Git LFS pointer begins, and no safetensors file


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype ('BF16', as in the format) and shape of a tensor, without its data."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return tensor_bytes(self.dtype, self.shape)

    @property
    def count(self) -> int:
        """Number of elements."""
        return tensor_bytes("U8", self.shape)


@dataclass(frozen=True, slots=True)
class StoredTensor(TensorSpec):
    """A tensor in a file."""

    file: Path
    offset: int
    """Of its first byte from the start of the file."""


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header: tensors by name in the file's order, and `__metadata__`."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def header_end(start: bytes) -> int:
    """Return the offset of the data in bytes, as the first eight bytes of a file claim it, unchecked."""
    (length,) = struct.unpack_from("<Q", start)
    return 8 + int(length)


def read_header(file: Path, *, headers_only: bool = False, whole: int | None = None) -> Header:
    """Return the checked header of a safetensors file; reads at most the header.

    Args:
        file: a safetensors file.
        headers_only: accept a file that ends after its header, without data; the header is checked all the same.
        whole: size in bytes of the file that such a header was taken from, if known.

    Raises:
        InputError: the file is missing, not safetensors, truncated or too long, or its header is wrong about offsets,
            sizes, dtypes or names.
    """
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            start = stream.read(8)
            if len(start) < 8:
                raise InputError(f"not a safetensors file: only {size} bytes long", file=file, remedy=_REFETCH)
            if start == _LFS:
                raise InputError("a Git LFS pointer, not the file it stands for", file=file, remedy="git lfs pull")
            data_start = header_end(start)
            length = data_start - 8
            if length > MAX_HEADER_BYTES or length > size - 8:
                raise InputError(
                    f"truncated or not a safetensors file: its header claims {length} bytes, the file has {size}",
                    file=file,
                    remedy=_REFETCH,
                )
            raw = stream.read(length)
    except OSError as error:
        raise InputError(
            f"cannot read: {error.strerror or error}", file=file, remedy="check that the file is there and readable"
        ) from error
    entries = _parse_json(raw, file)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(_is_text(word) for pair in metadata.items() for word in pair):
        raise InputError("the header's metadata is not a table of strings", file=file, remedy=_REFETCH)
    tensors = {name: _parse_entry(name, entry, file, data_start) for name, entry in entries.items()}
    if headers_only and size == data_start:
        size = data_start + sum(tensor.nbytes for tensor in tensors.values()) if whole is None else whole
    _check_layout(tensors.values(), file, data_start, size)
    return Header(tensors, metadata)


def encode_header(tensors: Iterable[TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """Return the header's bytes for tensors in this order, and each tensor's offset in the file by name.

    The header is padded with spaces so that the data begins at a multiple of eight.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begins: dict[str, int] = {}
    position = 0
    for tensor in tensors:
        begins[tensor.name] = position
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    data_start = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {name: data_start + begin for name, begin in begins.items()}


def _parse_json(raw: bytes, file: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for name, value in pairs:
            if name in table:
                raise ValueError(f"the name {name[:200]!r} appears twice")
            table[name] = value
        return table

    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the header is not valid JSON: {error}", file=file, remedy=_REFETCH) from error
    if not isinstance(entries, dict):
        raise InputError("the header is not a JSON object", file=file, remedy=_REFETCH)
    return entries


def _parse_entry(name: str, entry: object, file: Path, data_start: int) -> StoredTensor:
    def lie(what: str) -> InputError:
        return InputError(f"the header lies: {what}", file=file, tensor=repr(name)[1:-1], remedy=_REFETCH)

    if not name or not name.isprintable():
        raise lie("a tensor's name is empty or has unprintable characters")
    if not isinstance(entry, dict):
        raise lie("its entry is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise lie(f"unknown dtype {str(dtype)[:40]!r}")
    if not _is_sizes(shape):
        raise lie("its shape is not a list of sizes")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise lie("its data_offsets are not a begin and an end")
    if math.prod(shape) * DTYPES[dtype].bits % 8:
        raise lie(f"{math.prod(shape)} elements of {dtype} do not fill whole bytes")
    needed = tensor_bytes(dtype, tuple(shape))
    if needed != offsets[1] - offsets[0]:
        raise lie(f"dtype and shape need {needed} bytes, data_offsets give {offsets[1] - offsets[0]}")
    return StoredTensor(name, dtype, tuple(shape), file, data_start + offsets[0])


def _is_text(value: object) -> bool:
    """Return whether a value is a string that UTF-8 can hold, which half a surrogate pair is not."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _is_sizes(value: Any) -> TypeGuard[list[int]]:
    # A size is below 2⁶³; `type` and not `isinstance`, since JSON's true is an int to Python.
    return isinstance(value, list) and len(value) <= 64 and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _check_layout(tensors: Iterable[StoredTensor], file: Path, data_start: int, size: int) -> None:
    """Check that the tensors cover the file's data exactly, with no hole, overlap or end past the file."""
    position = data_start
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset + tensor.nbytes > size:
            raise InputError(
                f"truncated: the tensor ends at byte {tensor.offset + tensor.nbytes}, the file at byte {size}",
                file=file,
                tensor=tensor.name,
                remedy=_REFETCH,
            )
        if tensor.offset != position:
            what = "overlaps the one before it" if tensor.offset < position else "leaves a hole before it"
            raise InputError(f"the header lies: the tensor {what}", file=file, tensor=tensor.name, remedy=_REFETCH)
        position += tensor.nbytes
    if position != size:
        raise InputError(
            f"the header lies: the tensors end at byte {position}, the file at byte {size}",
            file=file,
            remedy=_REFETCH,
        )


def commonest_dtype(tensors: Iterable[TensorSpec]) -> str:
    """Return the dtype ('BF16') that most elements are stored in."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.count
    return max(sizes, key=lambda name: sizes[name])
