"""A PEFT LoRA adapter, read as base + scaling·B·A one tensor at a time.

Follows PEFT 0.21: rsLoRA, rank and alpha patterns, Conv1D (GPT-2), embeddings, convolutions, trained biases and
`modules_to_save`. Variants whose update is not scaling·B·A on an unchanged base are refused with the reason.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from basiscli.checkpoints.digests import stored_digest
from basiscli.checkpoints.files import ADAPTER_CONFIG, read_json
from basiscli.checkpoints.header import StoredTensor, TensorSpec
from basiscli.checkpoints.nola import NolaFactors
from basiscli.checkpoints.source import Source
from basiscli.checkpoints.views import Checkpoint
from basiscli.errors import InputError

if TYPE_CHECKING:
    import torch

    from basiscli.linalg.lowrank import LowRank

_PREFIX = "base_model.model."
CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
_REFUSED = {
    "use_dora": "DoRA rescales every column by a trained magnitude, so its update is not a low-rank product",
    "use_qalora": "QALoRA pools the inputs by quantisation group",
    "use_bdlora": "block-diagonal LoRA stores its factors in another layout",
    "kasa_config": "KaSA changes the base weights",
    "monteclora_config": "MonteCLoRA samples its factors",
    "arrow_config": "Arrow routes between adapters input by input",
    "alora_invocation_tokens": "an activated LoRA applies to part of the tokens only",
    "layer_replication": "the adapter replicates layers of its base",
    "trainable_token_indices": "single trained token rows are not supported",
    "target_parameters": "adapters on bare parameters (fused experts) are not supported",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class _Factors:
    """Where the two factors of one module are stored, and what scales them."""

    a: str
    b: str
    scaling: float
    embedding: bool = False


class Adapter:
    """The stored tensors of an adapter and its configuration; knows no base yet."""

    def __init__(self, source: Source) -> None:
        """Open an adapter folder.

        Raises:
            InputError: not LoRA, an unsupported variant, missing or unknown tensors.
        """
        self.source = source
        self.config = read_json(source.path / ADAPTER_CONFIG)
        is_random = self.config.get("peft_type") == "NOLA"
        if not is_random:
            self._refuse_variants()
        self.weights = Checkpoint.open(replace(source, path=_weights_file(source)))
        self.parts: Checkpoint | NolaFactors = self.weights
        """What factors are read from: what is stored, or what its seed and coefficients stand for."""
        if is_random:
            self.parts = NolaFactors(source, self.weights)
            self.config = self.parts.lora_config
        self.modules: dict[str, _Factors] = {}
        self.bias_deltas: dict[str, tuple[str, float]] = {}
        self.replaced: dict[str, str] = {}
        self._sort_tensors()

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max((self.parts.tensors[m.a].shape[0] for m in self.modules.values()), default=0)

    def _refuse_variants(self) -> None:
        def refuse(what: str, remedy: str = "merge it into its base with PEFT first and give the result") -> None:
            raise InputError(what, file=self.source.path / ADAPTER_CONFIG, remedy=remedy)

        if self.config.get("peft_type") != "LORA":
            values = self.config.get("peft_type") == "TINYLORA"
            refuse(
                f"this is a {self.config.get('peft_type')} adapter; only LORA is read",
                *(["make plain LoRA of it: `basis expand ADAPTER --initial START`"] if values else []),
            )
        for option, reason in _REFUSED.items():
            if self.config.get(option):
                refuse(f"{option} is set: {reason}")
        init = self.config.get("init_lora_weights")
        if isinstance(init, str) and init.startswith(_CHANGES_BASE):
            refuse(
                f"init_lora_weights is '{init}': the adapter belongs to a residual, not to the base it names",
                "convert it to plain LoRA with PEFT's `path_initial_model_for_weight_conversion`",
            )

    def _sort_tensors(self) -> None:
        """Tell factors, bias updates and replaced tensors apart by PEFT's naming."""
        a_parts: dict[str, str] = {}
        b_parts: dict[str, str] = {}
        for stored in self.parts.tensors:
            name = stored.removeprefix(_PREFIX).replace(".modules_to_save.default.", ".").replace(".base_layer.", ".")
            module, _, part = name.rpartition(".lora_")
            match part:
                case "A.weight" | "embedding_A":
                    a_parts[module] = stored
                case "B.weight" | "embedding_B":
                    b_parts[module] = stored
                case "B.bias":
                    self.bias_deltas[f"{module}.bias"] = (
                        stored,
                        self._scaling(module, self._rank_of(module)),
                    )
                case _ if module:
                    raise InputError("a part of LoRA that is not known", file=self.weights.files[0], tensor=stored)
                case _:
                    self.replaced[name] = stored
        for module in sorted(a_parts.keys() ^ b_parts.keys()):
            half = a_parts.get(module) or b_parts[module]
            raise InputError("one factor of the pair is missing", file=self.weights.files[0], tensor=half)
        if not a_parts and not self.replaced:
            raise InputError("the adapter holds no LoRA factors", file=self.weights.files[0])
        for module, a in a_parts.items():
            rank, other = self.parts.tensors[a].shape[0], self.parts.tensors[b_parts[module]].shape[1:2]
            if other != (rank,):
                raise InputError(f"factor A has rank {rank}, B has {other}", file=self.weights.files[0], tensor=a)
            expected = self._rank_of(module)
            if rank != expected:
                raise InputError(
                    f"the factors have rank {rank}, {ADAPTER_CONFIG} says {expected}",
                    file=self.weights.files[0],
                    tensor=a,
                    remedy="restore the adapter_config.json that was saved with these weights",
                )
            embedding = a.endswith("lora_embedding_A")
            self.modules[module] = _Factors(a, b_parts[module], self._scaling(module, rank), embedding)

    def _rank_of(self, module: str) -> int:
        return int(_by_pattern(self.config.get("rank_pattern"), module, self.config.get("r", 8)))

    def _scaling(self, module: str, rank: int) -> float:
        alpha = float(_by_pattern(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha", 8)))
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


class AdapterView:
    """An adapter on a base: reads like a full checkpoint that is never there."""

    def __init__(self, adapter: Adapter, base: Checkpoint) -> None:
        """Match the adapter's modules to the base's tensors.

        Raises:
            InputError: the adapter targets what the base lacks, or shapes differ: it belongs to another base.
        """
        self.adapter, self.base = adapter, base
        self.source = adapter.source
        self.files = [*base.files, *adapter.weights.files]
        names = [f"{module}.weight" for module in adapter.modules] + list(adapter.replaced)
        strip, add = _name_shift(names, base)

        def rename(name: str) -> str:
            return add + name.removeprefix(strip)

        self.modules = {rename(f"{module}.weight"): module for module in adapter.modules}
        """Weights of the base that have factors, and what the adapter calls their modules."""
        self._factors = {name: adapter.modules[module] for name, module in self.modules.items()}
        self._bias = {rename(name): delta for name, delta in adapter.bias_deltas.items()}
        self._replaced = {rename(name): stored for name, stored in adapter.replaced.items()}
        self._drop_tied_head()
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
        # A square matrix, or one this adapter leaves alone: only the module's type tells.
        conv1d = self.base.config.get("model_type") in CONV1D_MODELS
        return conv1d or bool(self.adapter.config.get("fan_in_fan_out"))

    def _drop_tied_head(self) -> None:
        """Forget an output head that PEFT saved beside the embedding it is tied to and that the base does not store."""
        stored = {name: self.adapter.weights.tensors[key] for name, key in self._replaced.items()}
        for name in [name for name in stored if name not in self.base.tensors and name.endswith("lm_head.weight")]:
            twins = [t for other, t in stored.items() if other != name and t.shape == stored[name].shape]
            head = stored[name]
            # Headers alone do not tell; what PEFT saves beside its twin nearly always is the same.
            hollow = head.file.stat().st_size < head.offset + head.nbytes
            if any(hollow or stored_digest(twin) == stored_digest(head) for twin in twins):
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


def _weights_file(source: Source) -> Path:
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (source.path / name).is_file():
            return source.path / name
    raise InputError("the adapter has no adapter_model.safetensors", file=source.path)


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    """Return PEFT's choice: the first key that matches the end of the module's name as a regular expression."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


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
