"""What a plan of `init` or `extract` refuses before any work: options, packed weights, ranks, another base."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Final

from basiscli.checkpoints.dtypes import DTYPES
from basiscli.checkpoints.views import Checkpoint
from basiscli.errors import InputError, UsageError
from basiscli.transforms import Method

NF4: Final = "nf4"
MOST_VALUES = 128  # PEFT's form of trained values holds rank³ numbers a module: 2 MB here, 8 once PEFT has saved it


def check_numbers(rank: int | None, energy: float | None) -> None:
    """Refuse a rank or a share of energy that is out of range; None is one that was not given.

    Raises:
        UsageError: it is.
    """
    if rank is not None and rank < 1:
        raise UsageError(f"rank {rank}", remedy="at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"energy {energy:g}", remedy="a share of the squared norm: more than 0, at most 1")


def check_options(method: Method, rank: int, alpha: float | None, rslora: bool, quantize: str | None) -> None:
    """Refuse options that the format of a method's adapters has no use for, and an alpha that is no positive number.

    Raises:
        UsageError: there is such an option.
    """
    values = method.trains == "values"
    if quantize is not None and quantize != NF4:
        raise UsageError(f"no 4-bit format is called '{quantize}'", remedy=f"--quantize {NF4}")
    if quantize is not None and (values or not method.principal):
        reason = (
            "PEFT does not load trained values on a 4-bit base"
            if values
            else "its factors are not the leading part of the weight, and would be the rounding's noise when they are "
            "taken again of what the 4-bit base lacks"
        )
        raise UsageError(f"{method.name} has no start for a quantised base: {reason}", remedy="--method pissa")
    if values and (alpha is not None or rslora):
        raise UsageError(
            f"{method.name} trains singular values, which no scaling multiplies",
            remedy="leave out --alpha and --rslora",
        )
    if values and rank > MOST_VALUES:
        raise UsageError(
            f"rank {rank} of trained values: PEFT's form of them holds rank³ numbers a module",
            remedy=f"--rank {MOST_VALUES} at most",
        )
    if alpha is not None and not (alpha > 0 and math.isfinite(alpha)):
        raise UsageError(f"alpha {alpha:g}", remedy="a positive number; the rank by default")


def check_unpacked(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose weights are codes of a quantiser, and one whose model brings code of its own.

    Raises:
        InputError: it is one.
    """
    config = checkpoint.config.get("quantization_config")
    if config:
        name = config.get("quant_method", "a quantiser") if isinstance(config, dict) else config
        raise InputError(
            f"the weights are packed by {name}: codes have no singular values",
            file=checkpoint.source.folder / "config.json",
            remedy="give the unquantised checkpoint, and quantise the residual afterwards",
        )
    if "auto_map" in checkpoint.config:
        raise InputError(
            "the model brings its own code, which is not run",
            file=checkpoint.source.folder / "config.json",
            remedy="give a model of an architecture that transformers has",
        )


def check_weights(checkpoints: Sequence[Checkpoint], targets: Collection[str], rank: int | None) -> None:
    """Refuse weights of fewer than 16 bits, and matrices with a side shorter than the rank.

    Args:
        checkpoints: the model, then the base that it is compared with, if there is one; of the same shapes.
        targets: names of the weights.
        rank: of every module; None where each takes what it needs.

    Raises:
        InputError: the dtype of a weight.
        UsageError: the rank.
    """
    most = min(min(checkpoints[0].tensors[name].shape) for name in targets)
    for name in targets:
        shape = checkpoints[0].tensors[name].shape
        for tensor in (checkpoint.tensors[name] for checkpoint in checkpoints):
            if not DTYPES[tensor.dtype].floating or DTYPES[tensor.dtype].bits < 16:
                raise InputError(
                    f"{tensor.dtype} weights are not decomposed", file=tensor.file, tensor=name,
                    remedy="give the unquantised checkpoint",
                )  # fmt: skip
        if rank is not None and rank > min(shape):
            raise UsageError(
                f"rank {rank} is larger than the matrix ({' × '.join(map(str, shape))})",
                tensor=name,
                remedy=f"--rank {most} at most, or fewer targets",
            )


def check_pair(model: Checkpoint, base: Checkpoint, targets: Collection[str]) -> list[str]:
    """Refuse a base that lacks a target or has it in another shape; return notes about what is not compared.

    Whether the fine-tune changed tensors that are no targets is not known here: only headers have been read.

    Raises:
        InputError: the base does not fit.
    """
    for name in targets:
        found = base.tensors.get(name)
        if found is None or found.shape != model.tensors[name].shape:
            what = "lacks it" if found is None else f"has {list(found.shape)}, not {list(model.tensors[name].shape)}"
            raise InputError(
                f"the base ({base.source.spec}) {what}",
                file=base.source.path,
                tensor=name,
                remedy="give the base that the model was tuned from with --base",
            )
    left = len(model.tensors) - len(targets)
    one = "1 other tensor is" if left == 1 else f"{left} other tensors are"
    return [f"{one} not compared: what the fine-tune changed there is not in the adapter"] if left else []
