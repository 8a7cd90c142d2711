"""`adapter_config.json` of an adapter that `init` or `extract` made: PEFT loads it as it is and initialises nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from basiscli.checkpoints.files import RESIDUAL
from basiscli.checkpoints.nola import nola_config
from basiscli.checkpoints.source import is_hub_id
from basiscli.commands.init.formats import NOLAFormat, TinyLoRAFormat
from basiscli.commands.init.plan import InitPlan
from basiscli.commands.init.run import InitRun


def peft_config(run: InitRun) -> bytes:
    """Return `adapter_config.json`, of LoRA, TinyLoRA or NOLA as the plan's format is."""
    plan = run.plan
    match plan.format:
        case NOLAFormat(bases=bases):
            config = _nola(plan, bases)
        case TinyLoRAFormat():
            config = _common(plan, list(plan.targets.values())) | _tinylora(plan.rank)
        case _:
            ranks = {plan.targets[name]: rank for name, rank in run.ranks.items() if rank}
            config = lora_config(plan, config_rank(run), ranks)
    return (json.dumps(config, indent=2) + "\n").encode()


def config_rank(run: InitRun) -> int:
    """Return what the configuration gives as `r`; modules of other ranks are in its `rank_pattern`."""
    return run.plan.rank if run.plan.energy is None else max(run.ranks.values())


def lora_config(plan: InitPlan, rank: int, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return the configuration of a LoRA: `r`, and the ranks of its modules by name."""
    return _common(plan, list(ranks)) | _lora(plan, rank, ranks)


def _common(plan: InitPlan, modules: list[str]) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": _task_type(plan),
        "base_model_name_or_path": _base_name(plan),
        # Full names: a suffix could match a module that has no factors.
        "target_modules": modules,
        "bias": "none",
        # PEFT asks each module and corrects this where they differ; where all are alike it is right.
        "fan_in_fan_out": bool(plan.transposed),
        "inference_mode": True,
        "modules_to_save": None,
    }


def _lora(plan: InitPlan, rank: int, ranks: Mapping[str, int]) -> dict[str, Any]:
    alpha = plan.alpha_of(rank)
    return {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": plan.rslora,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "rank_pattern": {module: own for module, own in ranks.items() if own != rank},
        "alpha_pattern": {module: plan.alpha_of(own) for module, own in ranks.items() if plan.alpha_of(own) != alpha},
    }


def _tinylora(rank: int) -> dict[str, Any]:
    return {
        "peft_type": "TINYLORA",
        "r": rank,
        "u": rank,  # as many values as directions
        "weight_tying": 0.0,  # every module its own
        "save_projection": True,  # P says which value is whose; drawn again it would be random
        "tinylora_dropout": 0.0,
        "init_weights": True,
    }


def _nola(plan: InitPlan, bases: int) -> dict[str, Any]:
    return nola_config(
        {module.name: [module.in_features, module.out_features] for module in plan.modules.values()},
        base=_base_name(plan), task_type=_task_type(plan), rank=plan.rank, bases=bases, alpha=plan.alpha_of(plan.rank),
        rslora=plan.rslora, seed=plan.settings.seed, transposed=bool(plan.transposed),
    )  # fmt: skip


def _task_type(plan: InitPlan) -> str | None:
    names = plan.model.config.get("architectures") or []
    causal = bool(names) and str(names[0]).endswith(("ForCausalLM", "LMHeadModel"))
    return "CAUSAL_LM" if causal else None


def _base_name(plan: InitPlan) -> str:
    """Return the Hub id or path of what the adapter is loaded on."""
    if plan.has_residual:
        return str(plan.out / RESIDUAL)
    source = (plan.base or plan.model).source
    is_id = is_hub_id(source.spec) and not Path(source.spec).exists()
    return source.repo_id or (source.spec if is_id else str(source.path))
