"""The command that makes an adapter again."""

from __future__ import annotations

import shlex

from basiscli.commands.init.plan import DEFAULT_RANK, InitPlan
from basiscli.commands.init.targets import ALL_LINEAR
from basiscli.reports.reproduce import file_name, number, parameter_words, seed_words


def init_command(plan: InitPlan) -> str:
    """Return the command that makes an adapter, for a shell: `basis init …`, or with a base `basis extract …`."""
    words = ["basis", "extract" if plan.base else "init", plan.model.source.label]
    words += ["--base", plan.base.source.label] if plan.base else ["--method", plan.method.name]
    words += parameter_words(plan.values)
    words += ["--energy", number(plan.energy)] if plan.energy is not None else []
    if plan.energy is None or plan.rank != DEFAULT_RANK:
        words += ["--rank", str(plan.rank)]
    words += ["--alpha", number(plan.alpha)] if plan.alpha is not None else []
    words += ["--rslora"] if plan.rslora else []
    words += ["--exact"] if plan.exact else []
    words += ["--quantize", plan.quantize] if plan.quantize else []
    if plan.target_modules != ALL_LINEAR:
        given = plan.target_modules if isinstance(plan.target_modules, str) else ",".join(plan.target_modules)
        words += ["--target-modules", given]
    if plan.calibration is not None:
        words += ["--calibration", file_name(plan.calibration.place)] if plan.calibration.place else []
        words += ["--tokens", str(plan.calibration.tokens), "--length", str(plan.calibration.length)]
    return shlex.join([*words, *seed_words(plan.settings.seed)])
