"""Adapters from weights or from data: PiSSA and its relatives, EVA, and a fine-tune taken out as a LoRA."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from basiscli.checkpoints.files import ADAPTER, RESIDUAL
from basiscli.checkpoints.source import Source
from basiscli.cli.keywords import keywords
from basiscli.commands.init.calibration import DEFAULT_LENGTH, DEFAULT_TOKENS, Calibration
from basiscli.commands.init.options import ExtractOptions, InitOptions
from basiscli.commands.init.plan import InitPlan, make_plan
from basiscli.commands.init.result import InitResult
from basiscli.engine.cluster import cluster_of, device_of, open_engine
from basiscli.engine.settings import Cluster, run_settings
from basiscli.hub.resolve import resolve
from basiscli.model.names import names_say_everything
from basiscli.progress import Progress, Silent
from basiscli.registry import Registry
from basiscli.reports.schema import Report
from basiscli.transforms import Method, transform

if TYPE_CHECKING:
    from torch import Tensor

    from basiscli.cli.session import View
    from basiscli.linalg.svd import SVD
    from basiscli.reports.contribution import Contribution
    from basiscli.reports.evaluations import EvaluationRecord

__all__ = [
    "ExtractOptions", "InitOptions", "InitResult", "extract", "init", "page", "plan", "plan_difference", "plan_extract",
    "plan_init", "run_init", "view",
]  # fmt: skip


@keywords(InitOptions)
def init(model: str | Path, *, progress: Progress | None = None, **options: Any) -> InitResult:
    """Make a LoRA adapter from a model's weights, and the residual that is its base, or from data (`eva`).

    residual + scaling · B A is the model, to one rounding of the storage dtype: training begins where the model stands.
    A method whose update begins at zero (`eva`, `nola`) leaves the base as it is, and no residual is written.

        start = basiscli.init("org/model", method="pissa", rank=16)
        base = AutoModelForCausalLM.from_pretrained(start.residual)
        model = PeftModel.from_pretrained(base, start.adapter, is_trainable=True)

    Args:
        model: a folder, a weights file or a Hub id.
        progress: a progress display; none by default.
        **options: by name:

    Raises:
        UsageError, InputError, HubError, ResourceError: see `basiscli.errors`.
    """
    return run_init(plan_init(model, **options), progress or Silent())


@keywords(ExtractOptions)
def extract(model: str | Path, *, base: str | Path, progress: Progress | None = None, **options: Any) -> InitResult:
    """Take a fine-tune out of a model as a LoRA adapter of its base: the truncated SVD of the difference.

        tuned = basiscli.extract("org/model-instruct", base="org/model", rank=32)
        model = PeftModel.from_pretrained(base, tuned.adapter)

    Args:
        model: the fine-tuned model.
        base: what it was tuned from.
        progress: a progress display; none by default.
        **options: by name:

    Raises:
        UsageError, InputError, HubError, ResourceError: see `basiscli.errors`.
    """
    return run_init(plan_extract(model, base=base, **options), progress or Silent())


@keywords(InitOptions)
def plan_init(model: str | Path, **options: Any) -> InitPlan:
    """Return the plan of an initialisation without writing anything and without importing torch."""
    return plan(InitOptions.of(model=model, **options))


@keywords(ExtractOptions)
def plan_extract(model: str | Path, *, base: str | Path, **options: Any) -> InitPlan:
    """Return the plan of an extraction without writing anything and without importing torch."""
    return plan_difference(ExtractOptions.of(model=model, base=base, **options))


def plan(options: InitOptions) -> InitPlan:
    """Return the plan of an initialisation that the options ask for."""
    found = Registry.with_files(options.plugins).find("init", options.method)
    tokens, length, text = options.tokens, options.length, None
    if options.calibration is not None or tokens is not None or length is not None:
        tokens = DEFAULT_TOKENS if tokens is None else tokens
        text = Calibration(options.calibration, tokens, min(DEFAULT_LENGTH, tokens) if length is None else length)
    cluster = cluster_of(dict(options), partial(plan, options.on_a_worker()))
    source = resolve(options.model, headers_only=options.headers_only)
    return _planned(
        source, None, found, options.method_parameters, options, cluster, calibration=text, quantize=options.quantize
    )


def plan_difference(options: ExtractOptions) -> InitPlan:
    """Return the plan of an extraction that the options ask for."""
    method: Method = difference.basis_method  # type: ignore[attr-defined]
    cluster = cluster_of(dict(options), partial(plan_difference, options.on_a_worker()))
    source, origin = (resolve(spec, headers_only=options.headers_only) for spec in (options.model, options.base))
    return _planned(source, origin, method, {}, options, cluster, energy=options.energy)


def view() -> View:
    """Return how the terminal shows plans and results of `init` and `extract`."""
    from basiscli.commands.init.cli import InitView

    return InitView()


def run_init(plan: InitPlan, progress: Progress) -> InitResult:
    """Carry out a plan; return where adapter and residual are, and the report.

    An interrupted run with the same plan is taken up where it stopped.

    Raises:
        UsageError, InputError, ResourceError: see `basiscli.errors`.
    """
    started = time.monotonic()
    from basiscli.commands.init.output_files import files_beside_weights
    from basiscli.commands.init.report import build_init_report
    from basiscli.commands.init.runs import run_type
    from basiscli.engine.partial import partial_output

    device = device_of(plan.settings)
    with (
        open_engine(plan, plan.settings) as engine,
        partial_output(plan, progress, resume=plan.settings.resume) as output,
    ):
        run = run_type(plan)(plan, output, progress, device, engine)
        run.run()
        report = build_init_report(run, seconds=time.monotonic() - started)
        output.commit(files_beside_weights(run, report), overwrite=plan.settings.overwrite)
    if plan.base is not None:
        return InitResult(plan.out, plan.out, None, report)
    return InitResult(plan.out, plan.out / ADAPTER, plan.out / RESIDUAL if plan.has_residual else None, report)


def page(report: Report, evaluations: Sequence[EvaluationRecord]) -> Contribution:
    """Return the sections that a report of `init` or `extract` has beside what all reports have."""
    from basiscli.commands.init.page import contribute

    return contribute(report, evaluations)


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
    options: InitOptions | ExtractOptions,
    cluster: Cluster | None,
    *,
    energy: float | None = None,
    calibration: Calibration | None = None,
    quantize: str | None = None,
) -> InitPlan:
    made = make_plan(
        source,
        method,
        parameters,
        base=base,
        rank=options.rank,
        energy=energy,
        alpha=options.alpha,
        rslora=options.rslora,
        exact=options.exact,
        quantize=quantize,
        target_modules=options.target_modules,
        calibration=calibration,
        out=options.output,
        settings=run_settings(dict(options), cluster),
    )
    if names_say_everything(made.model):
        return made
    from basiscli.commands.init.placed import placed

    return placed(made)
