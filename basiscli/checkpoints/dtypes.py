"""The dtypes of safetensors, by their names in the format and in torch; importing this does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from basiscli.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    import torch


class DType(NamedTuple):
    """A storage dtype: bits of an element, torch's name (None if torch lacks it), whether it holds real numbers."""

    bits: int
    torch_name: str | None
    floating: bool


DTYPES: dict[str, DType] = {
    "BOOL": DType(8, "bool", False),
    "U8": DType(8, "uint8", False),
    "I8": DType(8, "int8", False),
    "U16": DType(16, "uint16", False),
    "I16": DType(16, "int16", False),
    "U32": DType(32, "uint32", False),
    "I32": DType(32, "int32", False),
    "U64": DType(64, "uint64", False),
    "I64": DType(64, "int64", False),
    "F16": DType(16, "float16", True),
    "BF16": DType(16, "bfloat16", True),
    "F32": DType(32, "float32", True),
    "F64": DType(64, "float64", True),
    "C64": DType(64, "complex64", False),
    # Quantised storage: readable as bytes, never as numbers without scales that live elsewhere.
    "F8_E4M3": DType(8, "float8_e4m3fn", False),
    "F8_E5M2": DType(8, "float8_e5m2", False),
    "F8_E4M3FNUZ": DType(8, "float8_e4m3fnuz", False),
    "F8_E5M2FNUZ": DType(8, "float8_e5m2fnuz", False),
    "F8_E8M0": DType(8, "float8_e8m0fnu", False),
    "F6_E2M3": DType(6, None, False),
    "F6_E3M2": DType(6, None, False),
    "F4": DType(4, None, False),
}
"""Every dtype of the format by its name there. Only `floating` ones are merged or decomposed."""

_SPOKEN = {
    "float32": "F32",
    "fp32": "F32",
    "f32": "F32",
    "float16": "F16",
    "fp16": "F16",
    "f16": "F16",
    "half": "F16",
    "bfloat16": "BF16",
    "bf16": "BF16",
    "float64": "F64",
    "fp64": "F64",
}


def parse_dtype(word: str) -> str:
    """Return the format's name ('BF16') of a dtype that a user writes ('bfloat16', 'bf16').

    Raises:
        UsageError: no such dtype.
    """
    name = _SPOKEN.get(word.lower().removeprefix("torch."))
    if name is None:
        raise UsageError(f"unknown dtype '{word}'", remedy=did_you_mean(word, _SPOKEN))
    return name


def is_quantised(dtype: str) -> bool:
    """Return whether a dtype ('F8_E4M3', …) holds quantised codes, which mean nothing without their scales."""
    return dtype.startswith(("F8_", "F6_", "F4"))


def torch_dtype(dtype: str) -> torch.dtype:
    """Return torch's dtype for the format's name ('BF16'); imports torch."""
    import torch

    found: torch.dtype = getattr(torch, DTYPES[dtype].torch_name or "")
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """Return the format's name ('BF16') of a torch dtype."""
    spoken = str(dtype).removeprefix("torch.")
    return next(name for name, known in DTYPES.items() if known.torch_name == spoken)


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a CPU tensor: a view of its memory where it is contiguous, else of a copy."""
    import torch

    if not tensor.numel():
        return memoryview(b"")
    view: memoryview = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    return view


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the number of bytes of a tensor of this dtype ('BF16') and shape."""
    count = 1
    for size in shape:
        count *= size
    return (count * DTYPES[dtype].bits + 7) // 8
