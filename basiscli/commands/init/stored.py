"""Tensors on their way to the output: rounded to the dtype that the plan has for them, checked, written."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from basiscli.checkpoints.digests import digest
from basiscli.checkpoints.dtypes import torch_dtype
from basiscli.checkpoints.shards import Shards
from basiscli.errors import InputError
from basiscli.linalg.finite import is_finite


def as_stored(output: Shards, name: str, values: Tensor) -> Tensor:
    """Return values in the dtype in which the output has a tensor, contiguous.

    Raises:
        InputError: NaN or Inf, which finite values become where the dtype's range is too small.
    """
    dtype = output.layout.tensors[name].dtype
    stored = values.to(torch_dtype(dtype)).contiguous()
    if not is_finite(stored):
        raise InputError(f"the values do not fit {dtype}", tensor=name, remedy="a wider --dtype (bf16 or f32)")
    return stored


def write_stored(output: Shards, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Write tensors by name, each in its storage dtype; return the SHA-256 of their bytes by name."""
    return {name: digest([output.write(name, tensor)]) for name, tensor in tensors.items()}
