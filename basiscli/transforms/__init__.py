"""The contract between a transform and the core, and the decorator that makes one.

A transform is mathematics on named tensors. It never opens a file, chooses a device or prints. The simplest is a
function whose positional parameters say what it wants and whose keyword-only ones are its parameters:

    @transform("merge", elementwise=True, source="…")
    def mean(base, others, *, keep_base: bool = True):
        \"\"\"Plain average.\"\"\"
        models = [base, *others] if keep_base else others
        return sum(models) / len(models)

What a function may ask for, and what it returns, is said by family: `transforms.merge`, `transforms.init`,
`transforms.compress`. A method that needs one number over the whole model is a class derived from `TaskVectorMerge`;
one that takes an adapter's A from calibration data and shares out ranks is derived from `DataInit`; one that finds
bases for a KV cache from `KVCompression`.

This package imports no torch, and a transform should not at its top either: `--dry-run` then answers at once.
"""

from __future__ import annotations

from basiscli.transforms.compress import AttentionMoments, KVCompression
from basiscli.transforms.decorator import transform
from basiscli.transforms.init import DataInit, InputMoments
from basiscli.transforms.kind import Kind
from basiscli.transforms.merge import (
    Block,
    Blocks,
    Check,
    Choices,
    History,
    Norms,
    OntoWeight,
    TaskVectorMerge,
    TaskVectors,
)
from basiscli.transforms.method import Family, Method, Trained
from basiscli.transforms.parameters import Parameters

__all__ = [
    "AttentionMoments",
    "Block",
    "Blocks",
    "Check",
    "Choices",
    "DataInit",
    "Family",
    "History",
    "InputMoments",
    "KVCompression",
    "Kind",
    "Method",
    "Norms",
    "OntoWeight",
    "Parameters",
    "TaskVectorMerge",
    "TaskVectors",
    "Trained",
    "transform",
]
