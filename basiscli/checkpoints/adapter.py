"""A PEFT LoRA adapter as it is stored: its factors by module, its biases, and the tensors it trained whole.

Follows PEFT 0.21: rsLoRA, rank and alpha patterns, Conv1D (GPT-2), embeddings, convolutions, trained biases and
`modules_to_save`. Variants whose update is not scaling·B·A on an unchanged base are refused with the reason.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from basiscli.checkpoints.files import ADAPTER_CONFIG, read_json
from basiscli.checkpoints.nola import NolaFactors
from basiscli.checkpoints.source import Source
from basiscli.checkpoints.views import Checkpoint
from basiscli.errors import InputError

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
class Factors:
    """Names of the stored tensors A and B of one module, and the scaling of their product."""

    a: str
    b: str
    scaling: float
    embedding: bool = False
    """Whether they are an embedding's, which PEFT stores transposed."""


class Adapter:
    """The stored tensors of an adapter and its configuration; `AdapterView` puts it on a base."""

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
        self.modules: dict[str, Factors] = {}
        """By module name, as the adapter calls the base's modules."""
        self.bias_deltas: dict[str, tuple[str, float]] = {}
        """The stored update of a bias and its scaling, by the bias's name."""
        self.replaced: dict[str, str] = {}
        """Stored tensors that take the place of the base's (`modules_to_save`), by the base's names."""
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
                    self.bias_deltas[f"{module}.bias"] = stored, self._scaling(module, self._rank_of(module))
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
            self._add_factors(module, a, b_parts[module])

    def _add_factors(self, module: str, a: str, b: str) -> None:
        """Note the factors of a module, whose ranks are each other's and the configuration's."""
        rank, other = self.parts.tensors[a].shape[0], self.parts.tensors[b].shape[1:2]
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
        self.modules[module] = Factors(a, b, self._scaling(module, rank), a.endswith("lora_embedding_A"))

    def _rank_of(self, module: str) -> int:
        return int(_by_pattern(self.config.get("rank_pattern"), module, self.config.get("r", 8)))

    def _scaling(self, module: str, rank: int) -> float:
        alpha = float(_by_pattern(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha", 8)))
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


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
