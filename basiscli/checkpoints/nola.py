"""NOLA adapters on disk: coefficients in `adapter_model.safetensors`, the seed and sizes in `adapter_config.json`.

`NolaFactors` reads them as plain LoRA: factors are made from the seed one at a time, under the names of LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from basiscli.checkpoints.files import ADAPTER_CONFIG, read_json
from basiscli.checkpoints.header import StoredTensor
from basiscli.checkpoints.packing import unpacked
from basiscli.checkpoints.source import Source
from basiscli.checkpoints.views import Checkpoint
from basiscli.errors import InputError

if TYPE_CHECKING:
    import torch

PREFIX = "base_model.model."
_AGAIN = "save the adapter again, or restore the adapter_config.json that belongs to it"


def is_nola(source: Source) -> bool:
    """Return whether a source is a NOLA adapter: coefficients of random bases."""
    return source.is_adapter and read_json(source.path / ADAPTER_CONFIG).get("peft_type") == "NOLA"


def coefficient_counts(count: int, rank: int, in_features: int, out_features: int) -> tuple[int, int]:
    """Return the numbers of coefficients of A and B: `count`, but at most the factor's elements."""
    return min(count, rank * in_features), min(count, rank * out_features)


def note_features(features: dict[str, list[int]], module: str, sizes: list[int]) -> None:
    """Add a module's [in, out] to a `features` table, by its last name component or, if that differs, its full name."""
    leaf = module.rpartition(".")[2]
    if features.setdefault(leaf, sizes) != sizes or module in features:
        features[module] = sizes


def features_of(features: Mapping[str, list[int]], module: str) -> list[int] | None:
    """Return a module's [in, out] from a `features` table; None if it is not there."""
    return features.get(module) or features.get(module.rpartition(".")[2])


def nola_config(
    sizes: Mapping[str, list[int]],
    *,
    base: str | None,
    task_type: str | None,
    rank: int,
    bases: int,
    alpha: float,
    rslora: bool,
    seed: int,
    transposed: bool,
) -> dict[str, Any]:
    """Return the `adapter_config.json` of a NOLA adapter, with the seed that its bases are made from.

    Args:
        sizes: [in, out] of each module by name.
        base: name of the base model.
        task_type: PEFT's, such as CAUSAL_LM.
        rank: r.
        bases: random matrices per factor.
        alpha: the scaling is alpha / r, or alpha / √r with `rslora`.
        rslora: see `alpha`.
        seed: of the bases.
        transposed: whether weights are stored as [in, out] (GPT-2's Conv1D).
    """
    features: dict[str, list[int]] = {}
    for module, own in sizes.items():
        note_features(features, module, own)
    return {
        "peft_type": "NOLA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        # Full names: a suffix could match a module that has no coefficients.
        "target_modules": list(sizes),
        "r": rank,
        "num_bases": bases,
        "nola_alpha": alpha,
        "use_rslora": rslora,
        "seed": seed,
        "features": features,
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "modules_to_save": None,
    }


class NolaFactors:
    """The tensors of a NOLA adapter as LoRA factors, which are made when they are read; other tensors unchanged."""

    def __init__(self, source: Source, stored: Checkpoint) -> None:
        """Read the configuration and check it against the names of the stored coefficients.

        Raises:
            InputError: the configuration lacks something, or there are no coefficients.
        """
        self.source, self.stored, self.files = source, stored, stored.files
        self.config = read_json(source.path / ADAPTER_CONFIG)
        self.rank, self.count = self._whole("r", 8), self._whole("num_bases", 1024)
        self.seed = self.config.get("seed", 0)
        if not isinstance(self.seed, int):
            raise self._wrong(f"the seed is {self.seed!r}")
        self.tensors: dict[str, StoredTensor] = {}
        self._coefficients: dict[str, tuple[str, str, int, int]] = {}
        """By LoRA's name: the module, the stored name, and its [in, out]."""
        for name, tensor in stored.tensors.items():
            module, _, factor = name.rpartition(".nola_")
            if factor not in ("a", "b"):
                self.tensors[name] = tensor
                continue
            module = module.removeprefix(PREFIX)
            in_features, out_features = self._sizes(module)
            shape = (self.rank, in_features) if factor == "a" else (out_features, self.rank)
            own = f"{PREFIX}{module}.lora_{factor.upper()}.weight"
            self.tensors[own] = StoredTensor(own, "F32", shape, tensor.file, tensor.offset)
            self._coefficients[own] = (module, name, in_features, out_features)
        if not self._coefficients:
            raise InputError("the adapter holds no coefficients", file=stored.files[0], remedy=_AGAIN)

    @property
    def lora_config(self) -> dict[str, Any]:
        """The `adapter_config.json` of the equivalent LoRA adapter."""
        alpha = self.config.get("nola_alpha", 8)
        modules = [module for module, _, _, _ in self._coefficients.values()]
        return {
            "peft_type": "LORA",
            "task_type": self.config.get("task_type"),
            "base_model_name_or_path": self.config.get("base_model_name_or_path"),
            "revision": self.config.get("revision"),
            "target_modules": list(dict.fromkeys(modules)),
            "modules_to_save": self.config.get("modules_to_save"),
            "r": self.rank,
            "lora_alpha": alpha,
            "use_rslora": bool(self.config.get("use_rslora")),
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": bool(self.config.get("fan_in_fan_out")),
            "init_lora_weights": True,
            "inference_mode": True,
        }

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Return a tensor, or rows of it, by its LoRA name: a factor in float32, anything else as stored.

        Raises:
            InputError: the number of coefficients is not the configuration's, or they are not finite.
        """
        if name not in self._coefficients:
            return self.stored.read(name, rows)
        import torch

        from basiscli.linalg.nola import factor_bases

        module, stored, in_features, out_features = self._coefficients[name]
        bases = factor_bases(
            self.seed, module, rank=self.rank, count=self.count, in_features=in_features, out_features=out_features
        )[name.endswith("lora_B.weight")]
        try:
            coefficients = unpacked(self.stored.read(stored), bases.count)
        except ValueError as error:
            raise InputError(str(error), file=self.files[0], tensor=stored, remedy=_AGAIN) from error
        if not torch.isfinite(coefficients).all():
            raise InputError("the coefficients hold NaN or Inf", file=self.files[0], tensor=stored, remedy=_AGAIN)
        factor = bases.combination(coefficients)
        return factor if rows is None else factor[rows]

    def close(self) -> None:
        """Close the files."""
        self.stored.close()

    def _whole(self, key: str, default: int) -> int:
        value = self.config.get(key, default)
        if not isinstance(value, int) or value < 1:
            raise self._wrong(f"{key} is {value!r}")
        return value

    def _sizes(self, module: str) -> tuple[int, int]:
        table = self.config.get("features")
        sizes = features_of(table, module) if isinstance(table, dict) else None
        if not (isinstance(sizes, list) and len(sizes) == 2 and all(isinstance(n, int) and n > 0 for n in sizes)):
            raise self._wrong(f"`features` does not give [in, out] of {module}")
        if math.prod(sizes) > 1 << 40:
            raise self._wrong(f"`features` gives {module} {sizes[0]} × {sizes[1]} elements")
        return sizes[0], sizes[1]

    def _wrong(self, what: str) -> InputError:
        return InputError(what, file=self.source.path / ADAPTER_CONFIG, remedy=_AGAIN)
