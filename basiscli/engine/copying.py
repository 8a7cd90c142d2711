"""Copying a tensor from an input to the output, in blocks."""

from __future__ import annotations

import hashlib

from basiscli.checkpoints.dtypes import torch_dtype
from basiscli.checkpoints.views import Checkpoint, row_blocks
from basiscli.checkpoints.writer import PartialOutput

BLOCK_ELEMENTS = 1 << 22


def copy_tensor(source: Checkpoint, output: PartialOutput, name: str) -> str:
    """Copy a tensor in the dtype that the output's plan has for it; return the digest of what was written."""
    dtype = torch_dtype(output.layout.tensors[name].dtype)
    hasher = hashlib.sha256()
    for rows in row_blocks(source.tensors[name].shape, BLOCK_ELEMENTS):
        block = source.read(name, rows)
        if block.is_floating_point():
            block = block.to(dtype)
        hasher.update(output.write(name, block, rows.start if rows else 0))
    return hasher.hexdigest()
