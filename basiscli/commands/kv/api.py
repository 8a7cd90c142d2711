"""Compressing a model's KV cache by orthogonal projections."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from basiscli.checkpoints.dtypes import parse_dtype
from basiscli.cli.keywords import keywords
from basiscli.commands.kv.options import KVOptions
from basiscli.commands.kv.plan import KVPlan, KVSettings, plan_kv
from basiscli.engine.cluster import cluster_of, refuse_headers_only
from basiscli.engine.settings import default_workers
from basiscli.engine.tasks import Engine
from basiscli.engine.threads import Threads
from basiscli.errors import InputError, UsageError
from basiscli.hub.resolve import resolve
from basiscli.names import parse_size
from basiscli.progress import Progress, Silent
from basiscli.registry import Registry
from basiscli.reports.schema import Report

__all__ = ["CompressResult", "KVOptions", "compress", "plan", "plan_compress", "run_compress"]


@dataclass(frozen=True)
class CompressResult:
    """A finished compression: the output folder, and its report."""

    path: Path
    """The folder of the new checkpoint."""
    report: Report


_SETTINGS = (
    "train_steps", "batch", "length", "search", "fold_values", "export", "device", "seed", "resume", "overwrite",
    "headers_only",
)  # fmt: skip


@keywords(KVOptions)
def compress(model: str | Path = ".", *, progress: Progress | None = None, **options: Any) -> CompressResult:
    """Make a model's KV cache smaller and return the new checkpoint's path and report.

    Args:
        model: a folder, a weights file or a Hub id; an earlier result keeps its bases and gets new ranks.
        progress: a progress display; none by default.
        **options: by name:

    Raises:
        UsageError, InputError, HubError, ResourceError: see `basiscli.errors`. Nothing is then left under the output's
            name; after an interruption the same call goes on where it stopped.
    """
    return run_compress(plan_compress(model, **options), progress or Silent())


@keywords(KVOptions)
def plan_compress(model: str | Path = ".", **options: Any) -> KVPlan:
    """Return the plan of a compression without writing anything and without importing torch."""
    return plan(KVOptions.of(model=model, **options))


def plan(options: KVOptions) -> KVPlan:
    """Return the plan of a compression with these options, as `plan_compress` does."""
    ratio, budget = options.kv_ratio, options.kv_budget
    if (ratio is None) == (budget is None):
        raise UsageError("give one of kv_ratio and kv_budget", remedy="--kv-ratio 0.6 removes 60 % of the KV cache")
    for name in ("train_steps", "batch", "length", "workers"):
        least = {"train_steps": 0, "length": 16}.get(name, 1)
        value: Any = getattr(options, name)
        if value is not None and value < least:
            raise UsageError(f"{name} {value}", remedy=f"at least {least}")
    calibration = options.calibration
    if calibration is not None and not Path(calibration).exists():
        raise InputError("no such calibration file", file=Path(calibration), remedy="check the path")
    settings = KVSettings(
        calibration=calibration,
        dtype=parse_dtype(options.dtype) if options.dtype else None,
        shard_bytes=parse_size(options.shard_size),
        workers=options.workers or default_workers(),
        cluster=cluster_of(dict(options), partial(plan, options.on_a_worker())),
        **{name: getattr(options, name) for name in _SETTINGS},
    )
    return plan_kv(
        resolve(options.model, headers_only=settings.headers_only),
        1 - budget if budget is not None else float(ratio or 0.0),
        Registry.with_files(options.plugins).find("compress", options.method),
        options.parameters,
        options.output,
        settings,
    )


def run_compress(plan: KVPlan, progress: Progress) -> CompressResult:
    """Run a plan and return the output folder and report.

    Raises:
        UsageError, InputError, ResourceError: as for `compress`.
    """
    started = time.monotonic()
    refuse_headers_only(plan.settings.headers_only)
    from basiscli.checkpoints.files import REPORT
    from basiscli.checkpoints.kv_file import BASES_FILE
    from basiscli.checkpoints.sidecars import sidecar_files
    from basiscli.commands.kv.card import kv_card
    from basiscli.commands.kv.report import build_kv_report
    from basiscli.commands.kv.run import KVRun
    from basiscli.engine.devices import choose_device
    from basiscli.engine.partial import partial_output
    from basiscli.runtime.export import exported_files, without_export

    settings, device = plan.settings, choose_device(plan.settings.device)
    with ExitStack() as connection:
        engine: Engine = Threads(1 if device.type == "cuda" else settings.workers)  # one forward fills a GPU
        if settings.cluster is not None:
            from basiscli.engine.ray import connected

            engine = connection.enter_context(connected(settings.cluster, plan, device))
        with partial_output(plan, progress, resume=settings.resume) as output:
            run = KVRun(plan, output, progress, device, engine, connection.close)
            found = run.run()
            bases = found.files()
            report = build_kv_report(run, found, bases[BASES_FILE], seconds=time.monotonic() - started)
            files = sidecar_files(plan.model, settings.dtype, code=False) | bases
            files["config.json"] = without_export(files["config.json"])
            if settings.export:
                files |= exported_files(files["config.json"])
            files |= {REPORT: report.as_file(), "README.md": kv_card(plan, report)}
            output.commit(files, overwrite=settings.overwrite)
    return CompressResult(plan.out, report)
