"""Tensors and names of the LoRA adapter that a merge of adapters writes with `--as-adapter`."""

from __future__ import annotations

from collections.abc import Sequence

from basiscli.checkpoints.adapter_view import AdapterView, Model
from basiscli.checkpoints.header import TensorSpec
from basiscli.errors import InputError, UsageError
from basiscli.transforms import Method


def adapter_tensors(models: Sequence[Model], merged: list[str], method: Method) -> tuple[list[TensorSpec], int]:
    """Return the tensors of the merged adapter, A [rank, in] and B [out, rank] of each module, and the rank.

    One rank for all modules, which every serving engine can load: the sum of the adapters' ranks, where no module needs
    less.

    Args:
        models: the adapters.
        merged: names of the base's weights that the merge changes.
        method: of the merge.

    Raises:
        UsageError: the method does not keep low-rank factors, or a model is not an adapter.
        InputError: an adapter trains more than linear layers.
    """
    if not method.keeps_factors:
        raise UsageError(
            f"{method.name} cannot write an adapter", remedy="leave out --as-adapter, or use --method ortho"
        )
    views = [model for model in models if isinstance(model, AdapterView)]
    if len(views) < len(models):
        other = next(m for m in models if m not in views)
        raise UsageError(
            f"--as-adapter merges adapters, and {other.source.spec} is a full checkpoint",
            remedy="leave out --as-adapter",
        )
    for view in views:
        for name in merged:
            if view.changes(name) and (not view.is_low_rank(name) or not view.is_linear(name)):
                raise InputError(
                    "the adapter trains something that no LoRA of linear layers can hold",
                    file=view.source.path,
                    tensor=name,
                    remedy="leave out --as-adapter",
                )
    owners = {name: view for view in reversed(views) for name in view.modules}
    rank = max(min(sum(v.rank_of(n) for v in views), *owner.linear_shape(n)) for n, owner in owners.items())
    dtype = next(iter(views[-1].adapter.parts.tensors.values())).dtype
    specs = []
    for name in (name for name in merged if name in owners):
        out_features, in_features = owners[name].linear_shape(name)
        key_a, key_b = factor_keys(owners[name], name)
        specs += [
            TensorSpec(key_a, dtype, (rank, in_features)),
            TensorSpec(key_b, dtype, (out_features, rank)),
        ]
    return specs, rank


def factor_keys(view: AdapterView, name: str) -> tuple[str, str]:
    """Return PEFT's names of the LoRA factors A and B of a weight of the base."""
    module = f"base_model.model.{view.modules[name]}"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"
