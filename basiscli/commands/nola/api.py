"""Compressing a LoRA adapter to a seed and coefficients of random bases."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from basiscli.cli.keywords import keywords
from basiscli.commands.kv.api import CompressResult
from basiscli.commands.nola.options import NolaOptions, RandomBases
from basiscli.commands.nola.plan import NolaPlan, NolaSettings, plan_nola
from basiscli.engine.cluster import refuse_headers_only
from basiscli.errors import GateFailed, UsageError
from basiscli.hub.resolve import resolve
from basiscli.progress import Progress, Silent

__all__ = ["NolaOptions", "RandomBases", "compress_adapter", "plan", "plan_adapter", "run_adapter"]
_SETTINGS = (
    "weights_only", "steps", "batch", "length", "learning_rate", "min_fidelity", "force", "device", "seed", "overwrite",
    "headers_only",
)  # fmt: skip


@keywords(NolaOptions)
def compress_adapter(
    adapter: str | Path, *, bases: int, progress: Progress | None = None, **options: Any
) -> CompressResult:
    """Compress a LoRA adapter to 2·bases coefficients a module (NOLA) and return the new one's path and report.

    Coefficients are fitted to each layer's outputs s·B·A·x on calibration text, then trained on the adapter's logits.
    How much of the adapter's effect survives is measured on windows of the text that are not learned from; below
    `min_fidelity` nothing is written.

    Args:
        adapter: a folder or Hub id of a PEFT LoRA of linear layers.
        bases: random matrices per factor.
        progress: a progress display; none by default.
        **options: by name:

    Raises:
        GateFailed: less than `min_fidelity` survives.
        UsageError, InputError, HubError, ResourceError: see `basiscli.errors`. Nothing is then left under the output's
            name.
    """
    return run_adapter(plan_adapter(adapter, bases=bases, **options), progress or Silent())


@keywords(NolaOptions)
def plan_adapter(adapter: str | Path, *, bases: int, **options: Any) -> NolaPlan:
    """Return the plan of an adapter's compression without writing anything; arguments as for `compress_adapter`."""
    return plan(NolaOptions.of(adapter=adapter, bases=bases, **options))


def plan(options: NolaOptions) -> NolaPlan:
    """Return the plan of a compression with these options, as `plan_adapter` does."""
    if options.bases is None:
        raise UsageError("--method nola needs the number of bases", remedy="--bases 256 stores 512 numbers a module")
    return plan_nola(
        resolve(options.adapter, headers_only=options.headers_only),
        base=options.base,
        bases=options.bases,
        rank=options.rank,
        bits=options.bits,
        out=options.output,
        settings=NolaSettings(calibration=options.calibration, **{name: getattr(options, name) for name in _SETTINGS}),
    )


def run_adapter(plan: NolaPlan, progress: Progress) -> CompressResult:
    """Run a plan and return the output folder and report.

    Raises:
        GateFailed, UsageError, InputError, ResourceError: as for `compress_adapter`.
    """
    started = time.monotonic()
    refuse_headers_only(plan.settings.headers_only)
    from basiscli.checkpoints.files import REPORT
    from basiscli.commands.nola.card import nola_files
    from basiscli.commands.nola.report import build_nola_report
    from basiscli.commands.nola.run import NolaRun
    from basiscli.engine.devices import choose_device
    from basiscli.engine.partial import partial_output

    device = choose_device(plan.settings.device)
    with partial_output(plan, progress, resume=False) as output:
        run = NolaRun(plan, output, progress, device)
        try:
            run.run()
        except GateFailed:
            output.discard()  # nothing of it is of use to another try
            raise
        report = build_nola_report(run, seconds=time.monotonic() - started)
        output.commit({REPORT: report.as_file()} | nola_files(plan, report), overwrite=plan.settings.overwrite)
    return CompressResult(plan.out, report)
