"""Merging several checkpoints or LoRA adapters of one base into one."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Required, Unpack

from basiscli.checkpoints.source import is_hub_id
from basiscli.commands.merge.plan import MergePlan
from basiscli.commands.merge.plan import plan_merge as _plan
from basiscli.commands.merge.recipe import RECIPE
from basiscli.engine.cluster import cluster_of, device_of, engine_of
from basiscli.engine.settings import OutputOptions, run_settings
from basiscli.progress import Progress, Silent
from basiscli.registry import Registry
from basiscli.reports.schema import Report


@dataclass(frozen=True)
class MergeResult:
    """Where the result is, and its report."""

    path: Path
    report: Report


class RunOptions(OutputOptions, total=False):
    """How a merge is done, whatever says which; `merge` documents each."""

    memory: str
    plugins: Sequence[str | Path]
    headers_only: bool
    allow_nonfinite: bool
    allow_missing: bool
    trust_remote_code: bool


class MergeOptions(RunOptions, total=False):
    """What `merge` and `plan_merge` take by name; `merge` documents each."""

    method: Required[str]
    base: str | Path | None
    onto: str | Path | None
    parameters: Mapping[str, Any]
    weights: Sequence[float] | None
    as_adapter: bool


def merge(
    models: Sequence[str | Path], *, progress: Progress | None = None, **options: Unpack[MergeOptions]
) -> MergeResult:
    """Merge models into a new checkpoint (or adapter) and return its path and report.

    Args:
        models: folders, weight files, Hub ids (`org/name@revision`) or LoRA adapters; the order counts for `ortho`.
        progress: what to tell how far the work is.
        **options: by name:

            method: a name that `basis methods` lists (required).
            base: the common base; by default the one that all models name.
            onto: the result of an earlier merge by the same method, to be continued with these models.
            parameters: the method's parameters by name.
            weights: one number a model, for methods that take weights; all 1 by default.
            output: the folder to make; `./merge-METHOD` by default.
            as_adapter: write a LoRA adapter instead of a checkpoint (only adapters in, `ortho` only).
            plugins: Python files with further methods.
            device: 'auto', 'cpu', 'cuda', 'cuda:1'.
            dtype: storage dtype of the result; by default each tensor's in the base (else the first model).
            shard_size: size limit of a file, '5GB' by default.
            workers: tensors worked on at a time; any number gives the same bytes.
            memory: what tensors worked on side by side may take on a CPU, '1GB' by default; one alone may take more.
            seed: for methods that draw random numbers.
            resume: go on where an interrupted run of the same merge stopped (default).
            overwrite: replace an earlier output of basis.
            allow_nonfinite: accept NaN and Inf.
            allow_missing: accept parameters that only some models have: the base (else the first model) wins.
            trust_remote_code: copy `*.py` files of the base into the result; nothing runs them.
            headers_only: for `plan_merge`: of models of the Hub that are not here fetch headers alone, and accept
                safetensors files that end where their data would begin.
            engine: 'local', or 'ray': the tasks are done on a Ray cluster that shares this machine's file system.
            ray_address: of a cluster ('auto', 'host:port'); without it one is started on this machine.

    Raises:
        UsageError, InputError, HubError, ResourceError: see `basiscli.errors`. Nothing is then left under the output's
            name; after an interruption or a full disk, the same call goes on where it stopped.
    """
    return run_merge(plan_merge(models, **options), progress or Silent())


def plan_merge(models: Sequence[str | Path], **options: Unpack[MergeOptions]) -> MergePlan:
    """Return the plan of a merge without writing anything and without importing torch; arguments as for `merge`."""
    base, onto, names = options.get("base"), options.get("onto"), [str(model) for model in models]
    return _plan(
        names,
        Registry.with_files([Path(file) for file in options.get("plugins", ())]).find("merge", options["method"]),
        options.get("parameters", {}),
        base=None if base is None else str(base),
        onto=None if onto is None else str(onto),
        weights=options.get("weights"),
        out=options.get("output"),
        as_adapter=options.get("as_adapter", False),
        settings=run_settings(options, cluster_of(options, plan_merge, names)),
    )


def run_merge(plan: MergePlan, progress: Progress) -> MergeResult:
    """Carry out a plan."""
    started = time.monotonic()
    from basiscli.checkpoints.files import REPORT
    from basiscli.checkpoints.sidecars import sidecar_files
    from basiscli.commands.merge.report import build_report
    from basiscli.commands.merge.run import MergeRun
    from basiscli.engine.partial import partial_output
    from basiscli.reports.card import model_card

    device = device_of(plan.settings)
    with (
        engine_of(plan, plan.settings) as engine,
        partial_output(plan, progress, resume=plan.settings.resume) as output,
    ):
        run = MergeRun(plan, output, progress, device, engine)
        merging = time.monotonic()
        journal = run.run()
        now = time.monotonic()
        report = build_report(run, journal, seconds=now - started, seconds_merging=now - merging)
        card, warnings = model_card(plan, report)
        report = report.model_copy(update={"notes": [*report.notes, *warnings]})
        if plan.adapter_rank is None:
            tokenizer = plan.recipe.files if plan.recipe else None
            code = plan.settings.trust_remote_code
            files = sidecar_files(plan.reference, plan.settings.dtype, code=code, tokenizer=tokenizer)
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
