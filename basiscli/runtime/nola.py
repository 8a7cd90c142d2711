"""NOLA as a PEFT tuner: adapters that train, and store, only coefficients of random matrices.

    import basiscli.runtime.nola  # or: from basiscli import NolaConfig
    model = get_peft_model(model, NolaConfig(r=8, num_bases=512, target_modules="all-linear"))

Importing this module registers the method with PEFT under the name NOLA; `PeftModel.from_pretrained` then loads saved
adapters. What is in memory of a module's 2k bases is one block, in forward and in backward: they are made from the
seed where they are needed. The factors A and B themselves are kept while a model only answers.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, register_peft_method
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from basiscli.checkpoints.packing import unpacked
from basiscli.linalg.nola import factor_bases, start_of
from basiscli.linalg.randbasis import RandomBases
from basiscli.runtime.nola_config import NAME, NolaConfig

__all__ = ["NolaConfig", "NolaLayer", "NolaModel", "combination"]


class _Combination(torch.autograd.Function):
    """Σ cᵢ Bᵢ, whose gradient by cᵢ is ⟨Bᵢ, G⟩: bases are made anew each time, and none is kept."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, bases: RandomBases) -> Tensor:
        ctx.bases, ctx.dtype = bases, coefficients.dtype
        with torch.autocast(coefficients.device.type, enabled=False):
            return bases.combination(coefficients)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        with torch.autocast(gradient.device.type, enabled=False):
            return ctx.bases.projections(gradient).to(ctx.dtype), None


@torch.compiler.disable  # type: ignore[untyped-decorator]  # blocks of integer arithmetic are nothing to trace
def combination(coefficients: Tensor, bases: RandomBases) -> Tensor:
    """Return Σ cᵢ Bᵢ in float32, differentiable by the coefficients [k]."""
    found: Tensor = _Combination.apply(coefficients, bases)  # type: ignore[no-untyped-call]
    return found


class NolaLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A linear layer plus s·B·A with A = Σ aᵢAᵢ and B = Σ bⱼBⱼ, of which the coefficients a and b are parameters."""

    adapter_layer_names = ("nola_a", "nola_b")
    other_param_names = ("r", "scaling", "nola_dropout", "nola_bases")
    # PEFT's, which are not typed.
    get_base_layer: Any
    set_adapter: Any
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    _move_adapter_to_device_of_base_layer: Any

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: NolaConfig, module: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.nola_dropout = nn.ModuleDict()
        self.nola_bases: dict[str, tuple[RandomBases, RandomBases]] = {}
        self.nola_a = nn.ParameterDict()
        self.nola_b = nn.ParameterDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self._kept: dict[str, tuple[Any, Tensor, Tensor]] = {}
        inner = self.get_base_layer()
        self.transposed = config.fan_in_fan_out = isinstance(inner, Conv1D)
        if self.transposed:
            self.in_features, self.out_features = inner.weight.shape
        else:
            self.in_features, self.out_features = inner.in_features, inner.out_features
        self.update_layer(adapter_name, config, module)

    def update_layer(self, adapter_name: str, config: NolaConfig, module: str) -> None:
        """Add an adapter of this name with new coefficients, or begin it anew."""
        config.note_features(module, self.in_features, self.out_features)
        self.r[adapter_name], self.scaling[adapter_name] = config.r, config.scaling
        self.nola_dropout[adapter_name] = nn.Dropout(config.nola_dropout) if config.nola_dropout else nn.Identity()
        bases = self.nola_bases[adapter_name] = factor_bases(
            config.seed, module, rank=config.r, count=config.num_bases,
            in_features=self.in_features, out_features=self.out_features,
        )  # fmt: skip
        start = start_of(bases[1])
        self.nola_a[adapter_name] = nn.Parameter(start_of(bases[0]))
        self.nola_b[adapter_name] = nn.Parameter(torch.zeros_like(start) if config.init_weights else start)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return A [r, in] and B [out, r] in float32.

        Without gradients, and in evaluation, they are kept until a coefficient changes: as much memory as LoRA takes.
        """
        a, b = self.nola_a[adapter], self.nola_b[adapter]
        trained = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
        if self.training or trained or a.is_inference() or b.is_inference():
            self._kept.clear()
            return self._made(adapter)
        stamp = [(c.data_ptr(), c._version, c.device) for c in (a, b)]
        if adapter not in self._kept or self._kept[adapter][0] != stamp:
            # Also what is made in inference mode may later meet inputs with gradients.
            with torch.inference_mode(False), torch.no_grad():
                self._kept[adapter] = (stamp, *self._made(adapter))
        return self._kept[adapter][1:]

    def _made(self, adapter: str) -> tuple[Tensor, Tensor]:
        bases_a, bases_b = self.nola_bases[adapter]
        return combination(self.nola_a[adapter], bases_a), combination(self.nola_b[adapter], bases_b)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return s·B·A as the base layer stores its weight, in float32."""
        a, b = self.factors(adapter)
        delta = self.scaling[adapter] * (b @ a)
        return delta.mT if self.transposed else delta

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base layer's output plus s·B·A·x of every active adapter."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        total = result
        for adapter in self.active_adapters:
            if adapter in self.nola_a:
                a, b = self.factors(adapter)
                inner = nn.functional.linear(self.nola_dropout[adapter](x).to(a.dtype), a)
                total = total + nn.functional.linear(inner, b) * self.scaling[adapter]
        return total.to(result.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the update of adapters (the active ones by default) to the base's weight.

        Raises:
            ValueError: the weight is packed in few bits; with `safe_merge`, the sum holds NaN or Inf.
        """
        weight = self.get_base_layer().weight
        if not weight.dtype.is_floating_point:
            raise ValueError(f"a {weight.dtype} weight cannot take an update; load the base unquantised")
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.nola_a:
                continue
            merged = (weight.data.float() + self.get_delta_weight(adapter).detach()).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"adapter {adapter} merged gives NaN or Inf")
            weight.data = merged
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Subtract merged updates from the base's weight again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight = self.get_base_layer().weight
        while self.merged_adapters:
            delta = self.get_delta_weight(self.merged_adapters.pop()).detach()
            weight.data = (weight.data.float() - delta).to(weight.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return True: the update is a matrix added to the weight."""
        return True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Read coefficients stored in few bits; parameters are float32."""
        for adapter, factors in self.nola_bases.items():
            for name, bases in zip(("nola_a", "nola_b"), factors, strict=True):
                key = f"{prefix}{name}.{adapter}"
                if key in state_dict and state_dict[key].dtype == torch.uint8:
                    state_dict[key] = unpacked(state_dict[key], bases.count)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __repr__(self) -> str:
        return "nola." + super().__repr__()


class NolaModel(BaseTuner):  # type: ignore[misc]
    """PEFT's tuner for NOLA: replaces a model's linear layers by NOLA layers on them."""

    prefix = "nola_"
    tuner_layer_cls = NolaLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _create_and_replace(
        self,
        peft_config: NolaConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        if isinstance(target, NolaLayer):
            target.update_layer(adapter_name, peft_config, current_key)
            return
        inner = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(inner, nn.Linear | Conv1D):
            raise TypeError(f"{current_key} is a {type(inner).__name__}; NOLA adapts linear layers")
        layer = NolaLayer(target, adapter_name, peft_config, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is not trained until it is made active
        self._replace_module(parent, target_name, layer, target)


register_peft_method(name=NAME.lower(), config_cls=NolaConfig, model_cls=NolaModel, prefix=NolaModel.prefix)
