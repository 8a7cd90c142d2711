"""An adapter on its base, read like a full checkpoint that is never there: base + scaling·B·A, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from basiscli.checkpoints.adapter import CONV1D_MODELS, Adapter
from basiscli.checkpoints.header import StoredTensor, TensorSpec
from basiscli.checkpoints.tied import same_bytes, show_head
from basiscli.checkpoints.views import Checkpoint
from basiscli.errors import InputError

if TYPE_CHECKING:
    import torch

    from basiscli.linalg.lowrank import LowRank


class LoadedPart(Protocol):
    """What a stored tensor is in the loaded model; see `model.names.Part`."""

    @property
    def parameter(self) -> str: ...  # noqa: D102
    @property
    def is_whole(self) -> bool: ...  # noqa: D102
    @property
    def is_transposed(self) -> bool: ...  # noqa: D102


Parts = Callable[[], "Mapping[str, LoadedPart] | None"]
"""Tells what the base's tensors are in the loaded model, by stored name; None where nobody knows."""


class AdapterView:
    """The model that an adapter makes of its base, with the `tensors` and `read` of a full `Checkpoint`."""

    def __init__(self, adapter: Adapter, base: Checkpoint, parts: Parts = lambda: None) -> None:
        """Match the adapter's modules to the base's tensors.

        Args:
            adapter: as stored; its names are those of the loaded model, or of the base's files.
            base: what it changes.
            parts: asked, since it can take seconds, only where names or shapes leave something open.

        Raises:
            InputError: the adapter targets what the base lacks, or shapes differ: it belongs to another base.
        """
        self.adapter, self.base, self._ask = adapter, base, parts
        self.source = adapter.source
        self.files = [*base.files, *adapter.weights.files]
        names = [f"{module}.weight" for module in adapter.modules] + list(adapter.replaced)
        rename = self._renaming(names)
        self.modules = {rename(f"{module}.weight"): module for module in adapter.modules}
        """The adapter's names of the modules that have factors, by their weights' names in the base."""
        self._factors = {name: adapter.modules[module] for name, module in self.modules.items()}
        self._bias = {rename(name): delta for name, delta in adapter.bias_deltas.items()}
        self._replaced = {rename(name): stored for name, stored in adapter.replaced.items()}
        self._drop_tied_head()
        for name in [*self._factors, *self._replaced]:
            show_head(base, name)
        self.tensors: dict[str, TensorSpec] = dict(base.tensors)
        for name in [*self._factors, *self._bias, *self._replaced]:
            if name not in base.tensors:
                raise InputError(
                    f"the adapter changes {name}, which its base ({base.source.spec}) lacks",
                    file=adapter.weights.files[0],
                    tensor=name,
                    remedy="give the base that the adapter was trained on with --base",
                )
            self._check_shape(name, base.tensors[name])

    def changes(self, name: str) -> bool:
        """Return whether the adapter touches a tensor of its base."""
        return name in self._factors or name in self._bias or name in self._replaced

    @property
    def config(self) -> dict[str, Any]:
        """The base's `config.json`."""
        return self.base.config

    def keeps_tied(self, head: str, embedding: str) -> bool:
        """Return whether the adapter replaces an output head and the embedding it is tied to by the same numbers."""
        stored = [self.adapter.weights.tensors[self._replaced[n]] for n in (head, embedding) if n in self._replaced]
        return len(stored) == 2 and same_bytes(*stored)

    def is_low_rank(self, name: str) -> bool:
        """Return whether all that the adapter does to a tensor is a product of two factors, or nothing."""
        return name not in self._bias and name not in self._replaced

    def is_linear(self, name: str) -> bool:
        """Return whether the update is that of a linear layer (and not of an embedding or a convolution)."""
        return name not in self._factors or (len(self.tensors[name].shape) == 2 and not self._factors[name].embedding)

    def rank_of(self, name: str) -> int:
        """Return the rank of the update of a weight, 0 where it has none."""
        factors = self._factors.get(name)
        return self.adapter.parts.tensors[factors.a].shape[0] if factors else 0

    def linear_shape(self, name: str) -> tuple[int, int]:
        """Return (out_features, in_features) of a linear weight, which Conv1D stores the other way round."""
        rows, columns = self.tensors[name].shape
        return (columns, rows) if self.is_transposed(name) else (rows, columns)

    def low_rank(self, name: str) -> LowRank | None:
        """Return the update of a weight as factors in float32, with the scaling in b; None where it has none."""
        factors = self._factors.get(name)
        if factors is None:
            return None
        from basiscli.linalg.lowrank import LowRank

        a = self.adapter.parts.read(factors.a).float()
        b = self.adapter.parts.read(factors.b).float()
        if factors.embedding or self.is_transposed(name):
            a, b = b.mT, a.mT
        return LowRank(b.reshape(len(b), -1) * factors.scaling, a.reshape(len(a), -1), self.tensors[name].shape)

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Return a tensor of the adapted model; in float32 or better where the adapter changes it, else as stored."""
        tensor: torch.Tensor
        if name in self._replaced:
            tensor = self.adapter.weights.read(self._replaced[name], rows)
        else:
            tensor = self.base.read(name, rows)
        if name in self._bias:
            delta, scaling = self._bias[name]
            tensor = _widened(tensor) + self.adapter.weights.read(delta, rows).float() * scaling
        update = self.low_rank(name)
        return tensor if update is None else _widened(tensor) + update.dense(rows)

    def close(self) -> None:
        """Close the adapter's files; the base is its owner's to close."""
        self.adapter.weights.close()

    def is_transposed(self, name: str) -> bool:
        """Return whether the base stores a linear weight as (in, out), as GPT-2's Conv1D does."""
        shape = self.base.tensors[name].shape
        factors = self._factors.get(name)
        if len(shape) != 2 or (factors is not None and factors.embedding):
            return False
        if factors is not None and shape[0] != shape[1]:
            return shape[0] == self.adapter.parts.tensors[factors.a].shape[1]
        # A square matrix, or one this adapter leaves alone: only the module's class tells. `fan_in_fan_out` does not:
        # PEFT takes it back where the module is no Conv1D.
        if self._parts is not None and name in self._parts:
            return self._parts[name].is_transposed
        return self.base.config.get("model_type") in CONV1D_MODELS

    @cached_property
    def _parts(self) -> Mapping[str, LoadedPart] | None:
        return self._ask()

    def _renaming(self, names: list[str]) -> Callable[[str], str]:
        """Return what makes the base's stored names of the adapter's."""
        strip, add = _name_shift(names, self.base)
        if all(add + name.removeprefix(strip) in self.base.tensors for name in names) or self._parts is None:
            return lambda name: add + name.removeprefix(strip)
        stored = {part.parameter: name for name, part in self._parts.items() if part.is_whole}
        return lambda name: name if name in self.base.tensors else stored.get(name, name)

    def _drop_tied_head(self) -> None:
        """Forget an output head that PEFT saved beside the embedding it is tied to and that the base does not store."""
        stored = {name: self.adapter.weights.tensors[key] for name, key in self._replaced.items()}
        for name in [name for name in stored if name not in self.base.tensors and name.endswith("lm_head.weight")]:
            twins = [t for other, t in stored.items() if other != name and t.shape == stored[name].shape]
            if any(same_bytes(stored[name], twin) for twin in twins):
                del self._replaced[name]

    def _check_shape(self, name: str, target: StoredTensor) -> None:
        weights = self.adapter.weights
        if name in self._factors:
            factors = self._factors[name]
            a, b = self.adapter.parts.tensors[factors.a].shape, self.adapter.parts.tensors[factors.b].shape
            found = (b[0], *a[1:])
            fits = target.shape in (found, found[::-1]) if len(target.shape) == 2 else target.shape == found
        else:
            stored = self._bias[name][0] if name in self._bias else self._replaced[name]
            found = weights.tensors[stored].shape
            fits = target.shape == found
        if not fits:
            raise InputError(
                f"the adapter is for a tensor of shape {list(found)}, its base has {list(target.shape)}",
                file=weights.files[0],
                tensor=name,
                remedy=f"{self.base.source.spec} is another model or has another vocabulary: give the right --base",
            )


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype.itemsize == 8 else tensor.float()


def _name_shift(names: list[str], base: Checkpoint) -> tuple[str, str]:
    """Return the prefix to strip from the adapter's names and the one to add, to arrive at the base's.

    An adapter trained on `LlamaForCausalLM` says `model.layers.0…`; the same base saved from `LlamaModel` says
    `layers.0…`. One shift that fits every name is taken; where none does, names stay and the caller reports the first.
    """
    first = names[0]
    shifts = [("", "")]
    shifts += [(first[: -len(b)], "") for b in base.tensors if first.endswith(f".{b}")]
    shifts += [("", b[: -len(first)]) for b in base.tensors if b.endswith(f".{first}")]
    for strip, add in shifts:
        if all(add + name.removeprefix(strip) in base.tensors for name in names):
            return strip, add
    return "", ""


Model = Checkpoint | AdapterView
"""What a merge reads tensors from: weights as they are stored, or an adapter on its base."""
