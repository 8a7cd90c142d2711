"""Compressing a LoRA adapter to a seed and coefficients of random bases."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, TypedDict, Unpack

from basiscli.commands.kv.api import CompressResult
from basiscli.commands.nola.plan import NolaPlan, NolaSettings, plan_nola
from basiscli.engine.cluster import refuse_headers_only
from basiscli.errors import GateFailed
from basiscli.hub.resolve import resolve
from basiscli.progress import Progress, Silent


class NolaOptions(TypedDict, total=False):
    """What `compress_adapter` takes by name; it documents each."""

    base: str | Path | None
    rank: int | None
    bits: int
    output: str | Path | None
    calibration: str | Path | None
    weights_only: bool
    steps: int
    batch: int
    length: int
    learning_rate: float
    min_fidelity: float
    force: bool
    device: str
    seed: int
    overwrite: bool
    headers_only: bool


_SETTINGS = (
    "weights_only", "steps", "batch", "length", "learning_rate", "min_fidelity", "force", "device", "seed", "overwrite",
    "headers_only",
)  # fmt: skip


def compress_adapter(
    adapter: str | Path, *, bases: int, progress: Progress | None = None, **options: Unpack[NolaOptions]
) -> CompressResult:
    """Compress a LoRA adapter to 2·bases coefficients a module (NOLA) and return the new one's path and report.

    Coefficients are fitted to each layer's outputs s·B·A·x on calibration text, then trained on the adapter's logits.
    How much of the adapter's effect survives is measured on windows of the text that are not learned from; below
    `min_fidelity` nothing is written.

    Args:
        adapter: a folder or Hub id of a PEFT LoRA of linear layers.
        bases: random matrices a factor.
        progress: what to tell how far the work is.
        **options: by name:

            base: the base; by default the one that the adapter names.
            rank: of the result; by default the largest whose factors the bases span, 1 at least.
            bits: of a coefficient: 16 (default), 8 or 4.
            output: the folder to make; `./ADAPTER-nola` by default.
            calibration: text, JSONL, a folder of them, or safetensors tokens; a small built-in mix by default.
            weights_only: without a base, match the matrices s·B·A themselves.
            steps, batch, length: of the training on logits: steps (0 for none), windows a step, tokens a window.
            learning_rate: of AdamW, as a share of the size of the coefficients.
            min_fidelity: the least share of the effect that must survive, 0.5 by default.
            force: write the result all the same.
            device, seed, overwrite: as for `merge`; the seed also names the bases.
            headers_only: for `plan_adapter`, as for `merge`.

    Raises:
        GateFailed: less than `min_fidelity` survives.
        UsageError, InputError, HubError, ResourceError: see `basiscli.errors`. Nothing is then left under the output's
            name.
    """
    return run_adapter(plan_adapter(adapter, bases=bases, **options), progress or Silent())


def plan_adapter(adapter: str | Path, *, bases: int, **options: Unpack[NolaOptions]) -> NolaPlan:
    """Return the plan of such a compression without writing anything."""
    calibration, base = options.get("calibration"), options.get("base")
    given: dict[str, Any] = {name: options[name] for name in _SETTINGS if name in options}  # type: ignore[literal-required]
    return plan_nola(
        resolve(str(adapter), headers_only=options.get("headers_only", False)),
        base=None if base is None else str(base),
        bases=bases,
        rank=options.get("rank"),
        bits=options.get("bits", 16),
        out=options.get("output"),
        settings=NolaSettings(calibration=None if calibration is None else str(calibration), **given),
    )


def run_adapter(plan: NolaPlan, progress: Progress) -> CompressResult:
    """Carry out a plan."""
    started = time.monotonic()
    refuse_headers_only(plan.settings.headers_only)
    from basiscli.checkpoints.files import REPORT
    from basiscli.commands.nola.report import build_nola_report, nola_files
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
