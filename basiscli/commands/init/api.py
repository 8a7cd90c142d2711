"""Adapters from weights or from data: PiSSA and its relatives, EVA, and a fine-tune taken out as a LoRA."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

from basiscli.checkpoints.files import ADAPTER, RESIDUAL
from basiscli.checkpoints.source import Source
from basiscli.commands.init.calibration import DEFAULT_LENGTH, DEFAULT_TOKENS, Calibration
from basiscli.commands.init.plan import InitPlan, make_plan
from basiscli.commands.init.targets import ALL_LINEAR
from basiscli.engine.cluster import cluster_of, device_of, engine_of
from basiscli.engine.settings import Cluster, OutputOptions, run_settings
from basiscli.hub.resolve import resolve
from basiscli.progress import Progress, Silent
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
    """The base that belongs to the adapter; None where the base stays as it is (`extract`, EVA)."""
    report: Report


class InitOptions(OutputOptions, total=False):
    """What `init` and `extract` take by name; `init` documents each."""

    rank: int | None
    memory: str
    alpha: float | None
    rslora: bool
    exact: bool
    target_modules: str | Sequence[str]
    headers_only: bool
    allow_nonfinite: bool


def init(
    model: str | Path,
    *,
    method: str = "pissa",
    parameters: Mapping[str, Any] | None = None,
    calibration: str | Path | None = None,
    tokens: int | None = None,
    length: int | None = None,
    quantize: Literal["nf4"] | None = None,
    plugins: Sequence[str | Path] = (),
    progress: Progress | None = None,
    **options: Unpack[InitOptions],
) -> InitResult:
    """Make a LoRA adapter from a model's weights, and the residual that is its base, or from data (`eva`).

    residual + scaling · B A is the model, to one rounding of the storage dtype: training begins where the model stands.
    A method whose B is zero leaves the base as it is, and no residual is written.

    Args:
        model: a folder, a weights file or a Hub id.
        method: a name that `basis methods` lists under init.
        parameters: the method's parameters by name.
        calibration: for methods that look at data: a text file, JSONL with `text`, a folder of such files, or a
            safetensors file of tokens; by default a built-in mix.
        tokens: how many of it, at most; 16,384 by default.
        length: tokens a window, 512 by default.
        quantize: 'nf4' where the residual will be loaded in 4 bits: the factors take up what that loses (pissa, olora).
        plugins: Python files with further methods.
        progress: what to tell how far the work is.
        **options: by name:

            rank: of every factor, 16 by default; the mean of all where the method shares ranks out.
            alpha: PEFT's `lora_alpha`; the rank by default, so that the scaling is 1.
            rslora: scale by alpha / √rank.
            exact: decompose exactly; else to 3e-3, measured.
            target_modules: 'all-linear', a regular expression for whole module names, or a list of names.
            output: the folder to make, with `adapter/` and `residual/`; `./MODEL-METHOD` by default.
            allow_nonfinite: copy tensors with NaN or Inf; a weight that is decomposed may hold none.
            device, dtype, shard_size, workers, memory, seed, resume, overwrite, headers_only, engine, ray_address: as
                for `merge`.

    Raises:
        UsageError, InputError, HubError, ResourceError: see `basiscli.errors`.
    """
    plan = plan_init(
        model, method=method, parameters=parameters, calibration=calibration, tokens=tokens, length=length,
        quantize=quantize, plugins=plugins, **options,
    )  # fmt: skip
    return run_init(plan, progress or Silent())


def extract(
    model: str | Path,
    *,
    base: str | Path,
    energy: float | None = None,
    progress: Progress | None = None,
    **options: Unpack[InitOptions],
) -> InitResult:
    """Take a fine-tune out of a model as a LoRA adapter of its base: the truncated SVD of the difference.

    Args:
        model: the fine-tuned model.
        base: what it was tuned from.
        energy: instead of one rank for all: as many singular vectors of each difference as hold this share of its
            squared norm; a rank that is given, too, is the most.
        progress: what to tell how far the work is.
        **options: as for `init`; the output is the adapter's folder.

    Raises:
        UsageError, InputError, HubError, ResourceError: see `basiscli.errors`.
    """
    return run_init(plan_extract(model, base=base, energy=energy, **options), progress or Silent())


def plan_init(
    model: str | Path,
    *,
    method: str = "pissa",
    parameters: Mapping[str, Any] | None = None,
    calibration: str | Path | None = None,
    tokens: int | None = None,
    length: int | None = None,
    quantize: Literal["nf4"] | None = None,
    plugins: Sequence[str | Path] = (),
    **options: Unpack[InitOptions],
) -> InitPlan:
    """Return the plan of an initialisation without writing anything and without importing torch."""
    found = Registry.with_files([Path(file) for file in plugins]).find("init", method)
    text = None
    if calibration is not None or tokens is not None or length is not None:
        place = None if calibration is None else str(calibration)
        tokens = DEFAULT_TOKENS if tokens is None else tokens
        text = Calibration(place, tokens, min(DEFAULT_LENGTH, tokens) if length is None else length)
    again = partial(
        plan_init, method=method, parameters=parameters, calibration=calibration, tokens=tokens, length=length,
        quantize=quantize, plugins=plugins,
    )  # fmt: skip
    cluster = cluster_of(options, again, str(model))
    source = resolve(str(model), headers_only=options.get("headers_only", False))
    return _planned(source, None, found, parameters or {}, options, cluster, calibration=text, quantize=quantize)


def plan_extract(
    model: str | Path, *, base: str | Path, energy: float | None = None, **options: Unpack[InitOptions]
) -> InitPlan:
    """Return the plan of an extraction without writing anything and without importing torch."""
    method: Method = difference.basis_method  # type: ignore[attr-defined]
    cluster = cluster_of(options, partial(plan_extract, base=str(base), energy=energy), str(model))
    source, origin = (resolve(str(spec), headers_only=options.get("headers_only", False)) for spec in (model, base))
    return _planned(source, origin, method, {}, options, cluster, energy=energy)


def run_init(plan: InitPlan, progress: Progress) -> InitResult:
    """Carry out a plan."""
    started = time.monotonic()
    from basiscli.commands.init.output_files import files_beside_weights
    from basiscli.commands.init.report import build_init_report
    from basiscli.commands.init.runs import run_type
    from basiscli.engine.partial import partial_output

    device = device_of(plan.settings)
    with (
        engine_of(plan, plan.settings) as engine,
        partial_output(plan, progress, resume=plan.settings.resume) as output,
    ):
        run = run_type(plan)(plan, output, progress, device, engine)
        run.run()
        report = build_init_report(run, seconds=time.monotonic() - started)
        output.commit(files_beside_weights(run, report), overwrite=plan.settings.overwrite)
    if plan.base is not None:
        return InitResult(plan.out, plan.out, None, report)
    return InitResult(plan.out, plan.out / ADAPTER, plan.out / RESIDUAL if plan.has_residual else None, report)


@transform("init", name="extract", source="truncated SVD: Eckart and Young 1936")
def difference(weight: Tensor, rank: int, svd: SVD) -> tuple[Tensor, Tensor]:
    """The best approximation of the difference of two weights: B = U_r √Σ_r, A = √Σ_r V_rᵀ."""
    u, s, vh = svd.top(weight, rank)
    root = s.sqrt()
    return u * root, root[:, None] * vh


def _planned(
    source: Source,
    base: Source | None,
    method: Method,
    parameters: Mapping[str, Any],
    options: InitOptions,
    cluster: Cluster | None,
    *,
    energy: float | None = None,
    calibration: Calibration | None = None,
    quantize: str | None = None,
) -> InitPlan:
    return make_plan(
        source,
        method,
        parameters,
        base=base,
        rank=options.get("rank"),
        energy=energy,
        alpha=options.get("alpha"),
        rslora=options.get("rslora", False),
        exact=options.get("exact", False),
        quantize=quantize,
        target_modules=options.get("target_modules", ALL_LINEAR),
        calibration=calibration,
        out=options.get("output"),
        settings=run_settings(options, cluster),
    )
