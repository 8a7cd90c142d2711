"""SHA-256 digests of tensors, files and sets of weights; without torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from basiscli.checkpoints.header import StoredTensor, TensorSpec
from basiscli.errors import InputError


def digest(chunks: Iterable[bytes | memoryview]) -> str:
    """Return the SHA-256 of concatenated chunks of bytes, in hexadecimal."""
    state = hashlib.sha256()
    for chunk in chunks:
        state.update(chunk)
    return state.hexdigest()


def stored_digest(tensor: StoredTensor, block: int = 1 << 22) -> str:
    """Return the SHA-256 of a stored tensor's bytes, reading `block` bytes at a time.

    Raises:
        InputError: the file cannot be read or ends before the tensor does.
    """
    state, left = hashlib.sha256(), tensor.nbytes
    try:
        with tensor.file.open("rb") as stream:
            stream.seek(tensor.offset)
            while left:
                chunk = stream.read(min(block, left))
                if not chunk:
                    raise OSError("the file ends before the tensor does")
                state.update(chunk)
                left -= len(chunk)
    except OSError as error:
        raise InputError(
            f"cannot read: {error.strerror or error}",
            file=tensor.file,
            tensor=tensor.name,
            remedy="download or save the file again",
        ) from error
    return state.hexdigest()


def weights_digest(tensors: Iterable[TensorSpec], sha256: Mapping[str, str]) -> str:
    """Return one digest of a set of tensors, given each one's SHA-256 by name; see `Report.weights_digest`."""
    lines = (f"{t.name} {t.dtype} {list(t.shape)} {sha256[t.name]}\n" for t in sorted(tensors, key=lambda t: t.name))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def file_digest(file: Path) -> str | None:
    """Return the SHA-256 of a file in hexadecimal, None if it does not exist."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        return None
