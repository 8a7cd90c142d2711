"""The configuration of a NOLA adapter, and the name of the method among PEFT's."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.utils import PeftType

from basiscli.checkpoints.nola import features_of, note_features

NAME = "NOLA"


def _peft_type() -> PeftType:
    """Add a member to PEFT's enumeration of methods, which `register_peft_method` and saving look into."""
    member: Any = str.__new__(PeftType, NAME)
    member._name_ = member._value_ = NAME
    setattr(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    return PeftType(NAME)


_PEFT_TYPE = _peft_type()


@dataclass
class NolaConfig(PeftConfig):  # type: ignore[misc]
    """Configuration of a NOLA adapter: ΔW = s Σ bⱼBⱼ Σ aᵢAᵢ with random Aᵢ [r, in], Bⱼ [out, r].

    Args:
        r: rank of the update; it costs no parameters.
        num_bases: k, the random matrices a factor: a module trains 2k numbers (a factor no more than it has elements).
        target_modules: names, a regular expression, or 'all-linear'; by default PEFT's choice for LoRA.
        exclude_modules: names or a regular expression of modules to leave out.
        nola_alpha: s is nola_alpha / r.
        use_rslora: s is nola_alpha / √r.
        nola_dropout: share of a module's inputs that training sets to zero.
        seed: names the bases. Every module's are its own; its name within its layers decides them, not its order.
        init_weights: begin with ΔW = 0 (a random, b zero); else with both random.
        modules_to_save: further modules that are trained and saved whole.
        layers_to_transform: indices of the layers to adapt; all by default.
        layers_pattern: name of the list of layers, where it is not a usual one.
        features: [in, out] by module name or its last part. Filled in: with it an adapter can be read without its base.
        fan_in_fan_out: whether the base stores weights as [in, out], as GPT-2 does. Filled in, too.
    """

    r: int = 8
    num_bases: int = 1024
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    nola_alpha: float = 8
    use_rslora: bool = False
    nola_dropout: float = 0.0
    seed: int = 0
    init_weights: bool = True
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    features: dict[str, list[int]] = field(default_factory=dict)
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = _PEFT_TYPE
        for name in ("r", "num_bases"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; at least 1")
        if not 0 <= self.nola_dropout < 1:
            raise ValueError(f"`nola_dropout` is {self.nola_dropout}; from 0 to less than 1")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` is given without `layers_to_transform`")
        self._was_saved = bool(self.features)

    @property
    def scaling(self) -> float:
        """The factor s of ΔW = s·B·A."""
        return self.nola_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def note_features(self, module: str, in_features: int, out_features: int) -> None:
        """Keep a module's sizes in `features`, under the last part of its name where all modules of that name agree.

        Raises:
            ValueError: the adapter was made for other sizes.
        """
        found, known = [in_features, out_features], features_of(self.features, module)
        if self._was_saved and known != found:
            raise ValueError(f"{module} has [in, out] = {found}; the adapter was made for {known}")
        note_features(self.features, module, found)
