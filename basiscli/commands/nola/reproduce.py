"""The command that compresses an adapter again."""

from __future__ import annotations

import shlex

from basiscli.commands.nola.plan import NolaPlan
from basiscli.reports.reproduce import file_name, seed_words


def nola_command(plan: NolaPlan) -> str:
    """Return the shell command that repeats a compression: `basis compress ADAPTER --method nola …`."""
    settings = plan.settings
    words = ["basis", "compress", plan.adapter.source.label, "--method", "nola", "--bases", str(plan.bases)]
    words += ["--rank", str(plan.rank), "--bits", str(plan.bits)]
    if plan.base is None:
        words += ["--weights-only"]
    else:
        words += ["--base", plan.base.source.label]
        words += ["--calibration", file_name(settings.calibration)] if settings.calibration else []
        words += ["--steps", str(settings.steps), "--batch", str(settings.batch), "--length", str(settings.length)]
        words += ["--learning-rate", f"{settings.learning_rate:g}"]
    words += ["--min-fidelity", f"{settings.min_fidelity:g}", *(["--force"] if settings.force else [])]
    return shlex.join([*words, *seed_words(settings.seed)])
