"""Trained singular values as PEFT stores them: a TinyLoRA adapter with ΔW = B (Σᵢ vᵢ Pᵢ) A = B diag(v) A.

`basis init --method svfit` writes such adapters and PEFT trains them. TinyLoRA itself shares values among modules and
mixes them at random; adapters that do are refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from basiscli.checkpoints.files import ADAPTER_CONFIG, read_json
from basiscli.checkpoints.source import Source
from basiscli.checkpoints.views import Checkpoint
from basiscli.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

_FILE = "adapter_model.safetensors"
_PART = re.compile(r"base_model\.model\.(?P<module>.+)\.tinylora_(?P<part>[ABP])")
_VALUES = "base_model.tinylora_v."


@dataclass(frozen=True)
class ValueModule:
    """Names of the stored fixed tensors of one module: B [out, r], A [r, in], P [r, r, r]."""

    a: str
    b: str
    p: str


def is_tinylora(source: Source) -> bool:
    """Return whether a source is a PEFT TinyLoRA adapter."""
    return source.is_adapter and read_json(source.path / ADAPTER_CONFIG).get("peft_type") == "TINYLORA"


def selectors(rank: int) -> Tensor:
    """Return P [rank, rank, rank] for which Σᵢ vᵢ Pᵢ is the diagonal matrix of v; uint8, which PEFT reads."""
    import torch

    index = torch.arange(rank)
    found = torch.zeros(rank, rank, rank, dtype=torch.uint8)
    found[index, index, index] = 1
    return found


class TrainedValues:
    """The tensors of a TinyLoRA adapter whose values are singular values of a module each.

    Modules are stored by name and values by index; the order of the loaded model's modules tells which belong together.
    """

    def __init__(self, source: Source) -> None:
        """Open an adapter folder.

        Raises:
            InputError: another kind of adapter, values shared by modules, missing or unknown tensors.
        """
        self.source = source
        self.config: dict[str, Any] = read_json(source.path / ADAPTER_CONFIG)
        if not is_tinylora(source):
            raise InputError(
                f"this is a {self.config.get('peft_type')} adapter, whose factors are trained; not its singular values",
                file=source.path / ADAPTER_CONFIG,
                remedy="give an adapter that `basis init --method svfit` made, or what was trained from it",
            )
        if self.config.get("weight_tying"):
            raise self._refused("the modules share their values")
        self.weights = Checkpoint.open(replace(source, path=source.path / _FILE))
        self.modules: dict[str, ValueModule] = {}
        self.values: list[str] = []
        """Names of the tensors v [r], by PEFT's index."""
        self._sort_tensors()

    @property
    def rank(self) -> int:
        """Number of values per module, r."""
        return self.weights.tensors[self.values[0]].shape[0]

    def _sort_tensors(self) -> None:
        tensors = self.weights.tensors
        found: dict[str, dict[str, str]] = {}
        for name in tensors:
            if match := _PART.fullmatch(name):
                found.setdefault(match["module"], {})[match["part"]] = name
            elif not name.startswith(_VALUES):
                raise self._refused(f"it holds more than trained values: {name}")
        self.values = [f"{_VALUES}{index}" for index in range(len(found))]
        missing = [name for name in self.values if name not in tensors]
        if not found or missing or sum(name.startswith(_VALUES) for name in tensors) != len(found):
            raise self._refused(f"it has {len(found)} modules and not as many vectors of values")
        rank = self.rank if len(tensors[self.values[0]].shape) == 1 else 0
        for module, parts in found.items():
            whole = parts.keys() == {*"ABP"} and (
                tensors[parts["A"]].shape[:1] == tensors[parts["B"]].shape[1:] == (rank,)
                and tensors[parts["P"]].shape == (rank,) * 3
            )
            if not whole:
                raise self._refused(f"the parts of {module} do not fit together")
            self.modules[module] = ValueModule(parts["A"], parts["B"], parts["P"])
        for name in self.values:
            if tensors[name].shape != (rank,):
                raise self._refused(f"{name} has shape {list(tensors[name].shape)}, others [{rank}]")

    def _refused(self, what: str) -> InputError:
        return InputError(
            f"not an adapter of trained singular values: {what}",
            file=self.source.path,
            remedy="merge it into its base with PEFT and give the result",
        )
