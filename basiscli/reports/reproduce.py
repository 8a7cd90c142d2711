"""The command that makes a result again, in a folder that holds the inputs under their names."""

from __future__ import annotations

import json
import shlex
from typing import Any

from pydantic import BaseModel

from basiscli.commands.init.plan import DEFAULT_RANK, InitPlan
from basiscli.commands.init.targets import ALL_LINEAR
from basiscli.commands.kv.plan import KVPlan
from basiscli.commands.merge.plan import MergePlan
from basiscli.commands.merge.recipe import RECIPE


def merge_command(plan: MergePlan) -> str:
    """Return the command that makes a merge."""
    if plan.recipe is not None:
        words = ["basis", "run", RECIPE]
        if plan.settings.dtype and plan.settings.dtype != plan.recipe.dtype:
            words += ["--dtype", plan.settings.dtype.lower()]
        return shlex.join([*words, *(["--seed", str(plan.settings.seed)] if plan.settings.seed else [])])
    sources = [model.source.label for model in plan.models]
    weights = plan.weights[1:] if plan.history is not None else plan.weights
    words = ["basis", "merge"]
    words += [*sources[1:], "--onto", sources[0]] if plan.history is not None else sources
    words += ["--method", plan.method.name, *_parameters(plan.values)]
    if any(weight != 1.0 for weight in weights):
        words += ["--weights", ",".join(map(_number, weights))]
    words += ["--base", plan.base.source.label] if plan.base else []
    words += ["--dtype", plan.settings.dtype.lower()] if plan.settings.dtype else []
    words += ["--as-adapter"] if plan.adapter_rank is not None else []
    words += ["--seed", str(plan.settings.seed)] if plan.settings.seed else []
    return shlex.join(words)


def init_command(plan: InitPlan) -> str:
    """Return the command that makes an adapter from weights or from data."""
    words = ["basis", "extract" if plan.base else "init", plan.model.source.label]
    words += ["--base", plan.base.source.label] if plan.base else ["--method", plan.method.name]
    words += _parameters(plan.values)
    words += ["--energy", _number(plan.energy)] if plan.energy is not None else []
    if plan.energy is None or plan.rank != DEFAULT_RANK:
        words += ["--rank", str(plan.rank)]
    words += ["--alpha", _number(plan.alpha)] if plan.alpha is not None else []
    words += ["--rslora"] if plan.rslora else []
    words += ["--exact"] if plan.exact else []
    words += ["--quantize", plan.quantize] if plan.quantize else []
    if plan.target_modules != ALL_LINEAR:
        given = plan.target_modules if isinstance(plan.target_modules, str) else ",".join(plan.target_modules)
        words += ["--target-modules", given]
    if plan.calibration is not None:
        words += ["--calibration", plan.calibration.place.rpartition("/")[2]] if plan.calibration.place else []
        words += ["--tokens", str(plan.calibration.tokens), "--length", str(plan.calibration.length)]
    words += ["--seed", str(plan.settings.seed)] if plan.settings.seed else []
    return shlex.join(words)


def kv_command(plan: KVPlan) -> str:
    """Return the command that makes a KV compression."""
    settings = plan.settings
    words = ["basis", "compress", plan.model.source.label, "--kv-ratio", _number(plan.ratio)]
    words += ["--method", plan.method.name] if plan.method.name != "matryoshka" else []
    words += _parameters(plan.values)
    words += ["--calibration", settings.calibration.rpartition("/")[2]] if settings.calibration else []
    words += ["--train-steps", str(settings.train_steps), "--batch", str(settings.batch)]
    words += ["--length", str(settings.length), "--search", settings.search]
    words += ["--fold-v"] if settings.fold_values else []
    words += ["--export", settings.export] if settings.export else []
    words += ["--dtype", settings.dtype.lower()] if settings.dtype else []
    words += ["--seed", str(settings.seed)] if settings.seed else []
    return shlex.join(words)


def _parameters(values: BaseModel) -> list[str]:
    """Return `-p name=value` words; values as JSON, as the command line reads them."""
    return [word for name, value in values for word in ("-p", f"{name}={_value(value)}")]


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _number(value: float) -> str:
    return f"{value:.12g}"
