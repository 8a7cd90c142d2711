"""Intermediate results: small safetensors files, whole or not there."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from basiscli.checkpoints.disk import disk_error, write_all
from basiscli.checkpoints.dtypes import raw_bytes
from basiscli.checkpoints.header import TensorSpec, encode_header
from basiscli.checkpoints.layout import METADATA
from basiscli.checkpoints.transfer import to_host

if TYPE_CHECKING:
    import torch


def write_file(file: Path, tensors: Iterable[TensorSpec], data: Iterable[torch.Tensor]) -> str:
    """Write a safetensors file from front to back; return the SHA-256 of its bytes, in hexadecimal.

    Args:
        file: the file to make.
        tensors: what it holds, in order.
        data: their data in the same order, each tensor whole or in consecutive rows.
    """
    header, _ = encode_header(tensors, METADATA)
    state, position = hashlib.sha256(header), len(header)
    # Under its name only when it is whole: a worker that was given up for lost may still be writing the same file.
    unfinished = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
    try:
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except OSError as error:
        raise disk_error(error, file) from error
    try:
        write_all(descriptor, memoryview(header), 0, file)
        for part in data:
            chunk = raw_bytes(to_host(part))
            write_all(descriptor, chunk, position, file)
            state.update(chunk)
            position += len(chunk)
        unfinished.replace(file)
    finally:
        os.close(descriptor)
        unfinished.unlink(missing_ok=True)
    return state.hexdigest()
