"""Compressing a model's KV cache by orthogonal projections."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack, get_args

from basiscli.checkpoints.dtypes import parse_dtype
from basiscli.commands.kv.plan import Export, KVPlan, KVSettings, Search, plan_kv
from basiscli.engine.cluster import cluster_of, refuse_headers_only
from basiscli.engine.settings import OutputOptions, default_workers
from basiscli.engine.tasks import Engine
from basiscli.engine.threads import Threads
from basiscli.errors import InputError, UsageError
from basiscli.hub.resolve import resolve
from basiscli.names import parse_size
from basiscli.progress import Progress, Silent
from basiscli.registry import Registry
from basiscli.reports.schema import Report


@dataclass(frozen=True)
class CompressResult:
    """Where the result is, and its report."""

    path: Path
    report: Report


class CompressOptions(OutputOptions, total=False):
    """What `compress` and `plan_compress` take by name; `compress` documents each."""

    kv_ratio: float | None
    kv_budget: float | None
    method: str
    parameters: Mapping[str, Any]
    calibration: str | Path | None
    train_steps: int
    batch: int
    length: int
    search: Search
    fold_values: bool
    export: Export | None
    plugins: Sequence[str | Path]
    headers_only: bool


_SETTINGS = (
    "train_steps", "batch", "length", "search", "fold_values", "export", "device", "seed", "resume", "overwrite",
    "headers_only",
)  # fmt: skip


def compress(
    model: str | Path = ".", *, progress: Progress | None = None, **options: Unpack[CompressOptions]
) -> CompressResult:
    """Make a model's KV cache smaller and return the new checkpoint's path and report.

    Args:
        model: a folder, a weights file or a Hub id; an earlier result keeps its bases and gets new ranks.
        progress: what to tell how far the work is.
        **options: by name:

            kv_ratio: the share of the cache to remove, 0 ≤ ratio < 1 (0.6 leaves 40 % of the bytes).
            kv_budget: the same said as the share to keep; one of the two is required.
            method: a name that `basis methods` lists under compress; 'matryoshka' by default.
            parameters: the method's parameters by name.
            output: the folder to make; `../MODEL-kv0.6` beside the model by default.
            calibration: text, JSONL, a folder of them, or safetensors tokens; a small built-in mix by default.
            train_steps: steps of training; 0 for the bases without training.
            batch: windows a step.
            length: tokens a window.
            search: how ranks are found: 'greedy' (measured on the model), 'spectrum' or 'uniform'.
            fold_values: put the bases of the values into the weights.
            export: 'remote-code' adds Python files with which plain transformers uses the small cache.
            plugins: Python files with further methods.
            device: 'auto', 'cpu', 'cuda', 'cuda:1'.
            dtype: storage dtype of the result; by default as stored.
            shard_size: size limit of a file, '5GB' by default.
            workers: threads of the statistics and of the writing; on a cluster, tasks at a time.
            engine, ray_address: as for `merge`; the cluster takes the statistics, and the rest is done here.
            seed: decides the windows and ranks of each training step.
            resume: go on where an interrupted run stopped (default).
            overwrite: replace an earlier output of basis.
            headers_only: for `plan_compress`, as for `merge`.

    Raises:
        UsageError, InputError, HubError, ResourceError: see `basiscli.errors`. Nothing is then left under the output's
            name; after an interruption the same call goes on where it stopped.
    """
    return run_compress(plan_compress(model, **options), progress or Silent())


def plan_compress(model: str | Path = ".", **options: Unpack[CompressOptions]) -> KVPlan:
    """Return the plan of a compression without writing anything and without importing torch."""
    ratio, budget = options.get("kv_ratio"), options.get("kv_budget")
    if (ratio is None) == (budget is None):
        raise UsageError("give one of kv_ratio and kv_budget", remedy="--kv-ratio 0.6 removes 60 % of the KV cache")
    for name in ("train_steps", "batch", "length", "workers"):
        least = {"train_steps": 0, "length": 16}.get(name, 1)
        value: Any = options.get(name)
        if value is not None and value < least:
            raise UsageError(f"{name} {value}", remedy=f"at least {least}")
    for name, known in (("search", get_args(Search)), ("export", (*get_args(Export), None))):
        if name in options and options.get(name) not in known:
            raise UsageError(f"{name} {options.get(name)}", remedy=f"one of {', '.join(filter(None, known))}")
    calibration = options.get("calibration")
    if calibration is not None and not Path(calibration).exists():
        raise InputError("no such calibration file", file=Path(calibration), remedy="check the path")
    dtype = options.get("dtype")
    cluster = cluster_of(options, plan_compress, str(model))
    settings = KVSettings(
        calibration=None if calibration is None else str(calibration),
        dtype=parse_dtype(dtype) if dtype else None,
        shard_bytes=parse_size(options.get("shard_size", "5GB")),
        workers=options.get("workers") or default_workers(),
        cluster=cluster,
        **{name: options[name] for name in _SETTINGS if name in options},  # type: ignore[literal-required]
    )
    registry = Registry.with_files([Path(file) for file in options.get("plugins", ())])
    return plan_kv(
        resolve(str(model), headers_only=settings.headers_only),
        1 - budget if budget is not None else float(ratio or 0.0),
        registry.find("compress", options.get("method", "matryoshka")),
        options.get("parameters", {}),
        options.get("output"),
        settings,
    )


def run_compress(plan: KVPlan, progress: Progress) -> CompressResult:
    """Carry out a plan."""
    started = time.monotonic()
    refuse_headers_only(plan.settings.headers_only)
    from basiscli.checkpoints.files import REPORT
    from basiscli.checkpoints.kv_file import BASES_FILE
    from basiscli.checkpoints.sidecars import sidecar_files
    from basiscli.commands.kv.report import build_kv_report, kv_card
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
