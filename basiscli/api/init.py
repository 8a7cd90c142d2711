"""Adapters from weights: PiSSA and its relatives, and a fine-tune taken out as a LoRA."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from basiscli.checkpoints.dtypes import parse_dtype
from basiscli.checkpoints.source import Source, resolve
from basiscli.engine.init_plan import ADAPTER, ALL_LINEAR, RESIDUAL, InitPlan
from basiscli.engine.init_plan import plan_init as _plan
from basiscli.engine.local import Progress, Silent, default_workers
from basiscli.engine.merge_plan import Settings
from basiscli.errors import UsageError
from basiscli.names import parse_size
from basiscli.registry import Registry
from basiscli.reports.schema import Report
from basiscli.transforms import Method, transform

if TYPE_CHECKING:
    from torch import Tensor

    from basiscli.linalg.svd import SVD


@dataclass(frozen=True)
class InitResult:
    """Where the results are, and the report."""

    path: Path
    adapter: Path
    residual: Path | None
    """The base that belongs to the adapter; None where the base stays as it is (`extract`)."""
    report: Report


class InitOptions(TypedDict, total=False):
    """What `init` and `extract` take by name; `init` documents each."""

    rank: int
    alpha: float | None
    rslora: bool
    exact: bool
    target_modules: str | Sequence[str]
    output: str | Path | None
    device: str
    dtype: str | None
    shard_size: str
    workers: int | None
    seed: int
    resume: bool
    overwrite: bool
    allow_nonfinite: bool


_SETTINGS = ("device", "seed", "resume", "overwrite", "allow_nonfinite")


def init(
    model: str | Path,
    *,
    method: str = "pissa",
    parameters: Mapping[str, Any] | None = None,
    plugins: Sequence[str | Path] = (),
    progress: Progress | None = None,
    **options: Unpack[InitOptions],
) -> InitResult:
    """Make a LoRA adapter from a model's weights, and the residual that is its base.

    residual + scaling · B A is the model, to one rounding of the storage dtype: training begins where the model stands.

    Args:
        model: a folder, a weights file or a Hub id.
        method: a name that `basis methods` lists under init.
        parameters: the method's parameters by name.
        plugins: Python files with further methods.
        progress: what to tell how far the work is.
        **options: by name:

            rank: of every factor, 16 by default.
            alpha: PEFT's `lora_alpha`; the rank by default, so that the scaling is 1.
            rslora: scale by alpha / √rank.
            exact: decompose exactly; else to 3e-3, measured.
            target_modules: 'all-linear', a regular expression for whole module names, or a list of names.
            output: the folder to make, with `adapter/` and `residual/`; `./MODEL-METHOD` by default.
            allow_nonfinite: copy tensors with NaN or Inf; a weight that is decomposed may hold none.
            device, dtype, shard_size, workers, seed, resume, overwrite: as for `merge`.

    Raises:
        UsageError, InputError, HubError, ResourceError: see `basiscli.errors`.
    """
    plan = plan_init(model, method=method, parameters=parameters, plugins=plugins, **options)
    return run_init(plan, progress or Silent())


def extract(
    model: str | Path, *, base: str | Path, progress: Progress | None = None, **options: Unpack[InitOptions]
) -> InitResult:
    """Take a fine-tune out of a model as a LoRA adapter of its base: the truncated SVD of the difference.

    Args:
        model: the fine-tuned model.
        base: what it was tuned from.
        progress: what to tell how far the work is.
        **options: as for `init`; the output is the adapter's folder.

    Raises:
        UsageError, InputError, HubError, ResourceError: see `basiscli.errors`.
    """
    return run_init(plan_extract(model, base=base, **options), progress or Silent())


def plan_init(
    model: str | Path,
    *,
    method: str = "pissa",
    parameters: Mapping[str, Any] | None = None,
    plugins: Sequence[str | Path] = (),
    **options: Unpack[InitOptions],
) -> InitPlan:
    """Return the plan of an initialisation without writing anything and without importing torch."""
    registry = Registry.with_files([Path(file) for file in plugins])
    return _planned(resolve(str(model)), None, registry.find("init", method), parameters or {}, options)


def plan_extract(model: str | Path, *, base: str | Path, **options: Unpack[InitOptions]) -> InitPlan:
    """Return the plan of an extraction without writing anything and without importing torch."""
    method: Method = difference.basis_method  # type: ignore[attr-defined]
    return _planned(resolve(str(model)), resolve(str(base)), method, {}, options)


def run_init(plan: InitPlan, progress: Progress) -> InitResult:
    """Carry out a plan."""
    started = time.monotonic()
    from basiscli.checkpoints.sidecars import sidecar_files
    from basiscli.checkpoints.writer import REPORT
    from basiscli.engine.devices import choose_device
    from basiscli.engine.init_run import InitRun
    from basiscli.engine.partial import partial_output
    from basiscli.reports.init_report import build_init_report, lora_config, part_of

    device = choose_device(plan.settings.device)
    with partial_output(plan, progress, resume=plan.settings.resume) as output:
        run = InitRun(plan, output, progress, device)
        run.run()
        report = build_init_report(run, seconds=time.monotonic() - started)
        files = {REPORT: _json(report)}
        if plan.base is not None:
            files["adapter_config.json"] = lora_config(plan)
        else:
            beside = sidecar_files(plan.model, plan.settings.dtype, code=False)
            files |= {f"{RESIDUAL}/{name}": content for name, content in beside.items()}
            files |= {f"{part}/{REPORT}": _json(part_of(report, plan, part)) for part in (ADAPTER, RESIDUAL)}
            files[f"{ADAPTER}/adapter_config.json"] = lora_config(plan)
        output.commit(files, overwrite=plan.settings.overwrite)
    if plan.base is not None:
        return InitResult(plan.out, plan.out, None, report)
    return InitResult(plan.out, plan.out / ADAPTER, plan.out / RESIDUAL, report)


@transform("init", name="extract", source="truncated SVD: Eckart and Young 1936")
def difference(weight: Tensor, rank: int, svd: SVD) -> tuple[Tensor, Tensor]:
    """The best approximation of the difference of two weights: B = U_r √Σ_r, A = √Σ_r V_rᵀ."""
    u, s, vh = svd.top(weight, rank)
    root = s.sqrt()
    return u * root, root[:, None] * vh


def _planned(
    source: Source, base: Source | None, method: Method, parameters: Mapping[str, Any], options: InitOptions
) -> InitPlan:
    workers, dtype = options.get("workers"), options.get("dtype")
    if workers is not None and workers < 1:
        raise UsageError(f"{workers} workers", remedy="at least one")
    settings = Settings(
        dtype=parse_dtype(dtype) if dtype else None,
        shard_bytes=parse_size(options.get("shard_size", "5GB")),
        workers=workers or default_workers(),
        **{name: options[name] for name in _SETTINGS if name in options},  # type: ignore[literal-required]
    )
    return _plan(
        source,
        method,
        parameters,
        base=base,
        rank=options.get("rank", 16),
        alpha=options.get("alpha"),
        rslora=options.get("rslora", False),
        exact=options.get("exact", False),
        target_modules=options.get("target_modules", ALL_LINEAR),
        out=options.get("output"),
        settings=settings,
    )


def _json(report: Report) -> bytes:
    return (report.model_dump_json(indent=1) + "\n").encode()
