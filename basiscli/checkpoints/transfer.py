"""Copies between files and a GPU's memory through pinned CPU memory.

Only from pinned memory does a copy run beside everything else: while one piece is on its way, the next is read and
hashed. torch keeps pinned pieces and hands one out again when the copy that it was for has ended.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from basiscli.checkpoints.dtypes import raw_bytes, torch_dtype
from basiscli.checkpoints.views import Checkpoint, row_blocks

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from basiscli.checkpoints.adapter_view import AdapterView

PIECE_ELEMENTS = 1 << 22  # 8 MB of bfloat16: pinned memory is scarce, and a copy of that size is as fast as any


def read_to(
    device: torch.device,
    model: Checkpoint | AdapterView,
    name: str,
    rows: slice | None = None,
    seen: Callable[[memoryview], object] = lambda data: None,
) -> Tensor:
    """Return a tensor of a model, or rows of it, on a device in its storage dtype.

    Args:
        device: where to.
        model: a checkpoint, or an adapter on its base.
        name: of the tensor.
        rows: a slice of its first dimension; None for all.
        seen: called with the stored bytes in order, for hashing.

    Raises:
        InputError: the file ends before the tensor does.
    """
    import torch

    if not (_is_gpu(device) and isinstance(model, Checkpoint)):
        raw = model.read(name, rows)
        seen(raw_bytes(raw))
        return raw.to(device)
    stored = model.tensors[name]
    first, last, _ = (rows or slice(None)).indices(stored.shape[0] if stored.shape else 1)
    shape = (last - first, *stored.shape[1:]) if stored.shape else ()
    whole = torch.empty(shape, dtype=torch_dtype(stored.dtype), device=device)
    for part in row_blocks(shape, PIECE_ELEMENTS):
        inside = None if part is None else slice(first + part.start, first + part.stop)
        piece = model.read(name, rows if part is None else inside, pinned=True)
        (whole if part is None else whole[part]).copy_(piece, non_blocking=True)
        seen(raw_bytes(piece))
    return whole


def to_host(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU, after its copy has finished."""
    import torch

    if not _is_gpu(tensor.device) or tensor.numel() > PIECE_ELEMENTS:
        return tensor.cpu()
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    pinned.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()  # not the device: other threads' streams run on
    return pinned


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"
