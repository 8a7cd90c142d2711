"""Merging several checkpoints or LoRA adapters of one base into one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from basiscli.checkpoints.source import is_hub_id
from basiscli.cli.keywords import keywords
from basiscli.commands.merge.inputs import check_count, check_weights
from basiscli.commands.merge.options import MergeOptions
from basiscli.commands.merge.plan import MergePlan, plan_opened
from basiscli.commands.merge.plan import plan_merge as _plan
from basiscli.commands.merge.recipe import RECIPE, FromRecipe
from basiscli.engine.cluster import cluster_of, device_of, open_engine
from basiscli.engine.settings import run_settings
from basiscli.progress import Progress, Silent
from basiscli.registry import Registry
from basiscli.reports.schema import Report

__all__ = [
    "FromRecipe", "MergeOptions", "MergePlan", "MergeResult", "check_count", "check_weights", "merge", "plan",
    "plan_merge", "plan_opened", "run_merge",
]  # fmt: skip


@dataclass(frozen=True)
class MergeResult:
    """A finished merge: the output folder, and its report."""

    path: Path
    """The folder of the merged checkpoint or adapter."""
    report: Report


@keywords(MergeOptions)
def merge(models: Sequence[str | Path], *, progress: Progress | None = None, **options: Any) -> MergeResult:
    """Merge models and return the merged checkpoint's path and report.

    Args:
        models: folders, weight files, Hub ids (`org/name@revision`) or LoRA adapters; the order counts for `ortho`.
        progress: a progress display; none by default.
        **options: by name:

    Raises:
        UsageError, InputError, HubError, ResourceError: see `basiscli.errors`. Nothing is then left under the output's
            name; after an interruption or a full disk, the same call goes on where it stopped.
    """
    return run_merge(plan_merge(models, **options), progress or Silent())


@keywords(MergeOptions)
def plan_merge(models: Sequence[str | Path], **options: Any) -> MergePlan:
    """Return the plan of a merge without writing anything and without importing torch; arguments as for `merge`."""
    return plan(MergeOptions.of(models=list(models), **options))


def plan(options: MergeOptions) -> MergePlan:
    """Return the plan of a merge with these options, as `plan_merge` does."""
    return _plan(
        options.models,
        Registry.with_files(options.plugins).find("merge", options.method),
        options.parameters,
        base=options.base,
        onto=options.onto,
        weights=options.weights,
        out=options.output,
        as_adapter=options.as_adapter,
        settings=run_settings(dict(options), cluster_of(dict(options), partial(plan, options.on_a_worker()))),
    )


def run_merge(plan: MergePlan, progress: Progress) -> MergeResult:
    """Run a plan and return the output folder and report.

    Raises:
        UsageError, InputError, ResourceError: as for `merge`.
    """
    started = time.monotonic()
    from basiscli.checkpoints.files import REPORT
    from basiscli.checkpoints.sidecars import sidecar_files
    from basiscli.commands.merge.card import merge_card
    from basiscli.commands.merge.report import build_report
    from basiscli.commands.merge.run import MergeRun
    from basiscli.engine.partial import partial_output

    device = device_of(plan.settings)
    with (
        open_engine(plan, plan.settings) as engine,
        partial_output(plan, progress, resume=plan.settings.resume) as output,
    ):
        run = MergeRun(plan, output, progress, device, engine)
        merging = time.monotonic()
        journal = run.run()
        now = time.monotonic()
        report = build_report(run, journal, seconds=now - started, seconds_merging=now - merging)
        card, warnings = merge_card(plan, report)
        report = report.model_copy(update={"notes": [*report.notes, *warnings]})
        if plan.adapter_rank is None:
            tokenizer = plan.recipe.files if plan.recipe else None
            code = plan.settings.trust_remote_code
            files = sidecar_files(
                plan.reference, plan.settings.dtype, code=code, tokenizer=tokenizer, untied=plan.untied
            )
        else:
            files = {"adapter_config.json": _adapter_config(plan, plan.adapter_rank)}
        files |= {REPORT: report.as_file(), "README.md": card}
        files |= {RECIPE: plan.recipe.text.encode()} if plan.recipe else {}
        output.commit(files, overwrite=plan.settings.overwrite)
    return MergeResult(plan.out, report)


def _adapter_config(plan: MergePlan, rank: int) -> bytes:
    from basiscli.checkpoints.sidecars import adapter_config

    views = plan.views
    modules = {module for view in views for module in view.modules.values()}
    named, base = views[-1].source.base_model, plan.reference.source
    # A relative path would point elsewhere from the new folder; the Hub's name or an absolute path stays.
    keep = named is not None and (is_hub_id(named) or Path(named).is_absolute())
    return adapter_config(views[-1].adapter.config, list(modules), rank, named if keep else str(base.path))
