"""Copying a tensor from an input checkpoint to the output, in blocks of rows."""

from __future__ import annotations

import hashlib

from basiscli.checkpoints.dtypes import DTYPES, torch_dtype
from basiscli.checkpoints.views import Checkpoint, row_blocks
from basiscli.checkpoints.writer import PartialOutput
from basiscli.errors import InputError
from basiscli.linalg.finite import is_finite

BLOCK_ELEMENTS = 1 << 22


def copy_tensor(source: Checkpoint, output: PartialOutput, name: str, *, allow_nonfinite: bool = False) -> str:
    """Copy a tensor into the output, in the dtype that its layout has for it; return the SHA-256 of the bytes written.

    At most `BLOCK_ELEMENTS` elements are in memory at a time.

    Raises:
        InputError: NaN or Inf in the input, unless allowed, or a value beyond the output dtype's range.
    """
    stored, planned = source.tensors[name], output.layout.tensors[name].dtype
    dtype = torch_dtype(planned)
    checked = DTYPES[stored.dtype].bits >= 16 and not allow_nonfinite  # torch cannot sum what is narrower
    hasher = hashlib.sha256()
    for rows in row_blocks(source.tensors[name].shape, BLOCK_ELEMENTS):
        block = source.read(name, rows)
        if checked and not is_finite(block):
            raise InputError(
                "the tensor holds NaN or Inf", file=stored.file, tensor=name,
                remedy="give a sound checkpoint, or --allow-nonfinite to go on",
            )  # fmt: skip
        if block.is_floating_point():
            block = block.to(dtype)
            if checked and not is_finite(block):
                raise InputError(
                    f"the values do not fit {planned}", file=stored.file, tensor=name,
                    remedy="a wider --dtype (bf16 or f32)",
                )  # fmt: skip
        hasher.update(output.write(name, block, rows.start if rows else 0))
    return hasher.hexdigest()
