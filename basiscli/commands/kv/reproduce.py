"""The command that compresses a KV cache again."""

from __future__ import annotations

import shlex

from basiscli.commands.kv.plan import KVPlan
from basiscli.reports.reproduce import file_name, number, parameter_words, seed_words


def kv_command(plan: KVPlan) -> str:
    """Return the shell command that repeats a KV compression: `basis compress MODEL --kv-ratio 0.6 …`."""
    settings = plan.settings
    words = ["basis", "compress", plan.model.source.label, "--kv-ratio", number(plan.ratio)]
    words += ["--method", plan.method.name] if plan.method.name != "matryoshka" else []
    words += parameter_words(plan.values)
    words += ["--calibration", file_name(settings.calibration)] if settings.calibration else []
    words += ["--train-steps", str(settings.train_steps), "--batch", str(settings.batch)]
    words += ["--length", str(settings.length), "--search", settings.search]
    words += ["--fold-v"] if settings.fold_values else []
    words += ["--export", settings.export] if settings.export else []
    words += ["--dtype", settings.dtype.lower()] if settings.dtype else []
    return shlex.join([*words, *seed_words(settings.seed)])
