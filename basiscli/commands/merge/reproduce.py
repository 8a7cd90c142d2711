"""The command that makes a merge again."""

from __future__ import annotations

import shlex

from basiscli.commands.merge.plan import MergePlan
from basiscli.commands.merge.recipe import RECIPE
from basiscli.reports.reproduce import number, parameter_words, seed_words


def merge_command(plan: MergePlan) -> str:
    """Return the shell command that repeats a merge: `basis merge a b --method ties …`, or `basis run recipe.yaml`."""
    if plan.recipe is not None:
        words = ["basis", "run", RECIPE]
        if plan.settings.dtype and plan.settings.dtype != plan.recipe.dtype:
            words += ["--dtype", plan.settings.dtype.lower()]
        return shlex.join([*words, *seed_words(plan.settings.seed)])
    sources = [model.source.label for model in plan.models]
    weights = plan.weights[1:] if plan.history is not None else plan.weights
    words = ["basis", "merge"]
    words += [*sources[1:], "--onto", sources[0]] if plan.history is not None else sources
    words += ["--method", plan.method.name, *parameter_words(plan.values)]
    if any(weight != 1.0 for weight in weights):
        words += ["--weights", ",".join(map(number, weights))]
    words += ["--base", plan.base.source.label] if plan.base else []
    words += ["--dtype", plan.settings.dtype.lower()] if plan.settings.dtype else []
    words += ["--as-adapter"] if plan.adapter_rank is not None else []
    return shlex.join([*words, *seed_words(plan.settings.seed)])
