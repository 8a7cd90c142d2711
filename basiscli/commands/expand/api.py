"""The way back: a trained PiSSA, SVFit or NOLA adapter as plain LoRA of the original base, any as a checkpoint."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from basiscli.checkpoints.adapter import Adapter
from basiscli.checkpoints.nola import is_nola
from basiscli.checkpoints.source import Source
from basiscli.checkpoints.tinylora import is_tinylora
from basiscli.cli.keywords import keywords
from basiscli.commands.expand.coefficients import CoefficientsAsLoRA
from basiscli.commands.expand.factors import FactorsAsLoRA
from basiscli.commands.expand.lora import PlainLoRA, write_lora
from basiscli.commands.expand.options import ExpandOptions
from basiscli.commands.expand.values import ValuesAsLoRA
from basiscli.commands.merge.api import merge
from basiscli.engine.output_folder import output_folder
from basiscli.errors import InputError, UsageError
from basiscli.hub.resolve import resolve
from basiscli.progress import Progress, Silent


@dataclass(frozen=True)
class ExpandResult:
    """Where the result is, and what it is."""

    path: Path
    """A folder: of an adapter, or of a checkpoint."""
    kind: str
    """'adapter' or 'checkpoint'."""
    weights_digest: str
    """SHA-256 over names, dtypes, shapes and bytes of all tensors."""
    modules: int
    """How many the adapter has factors for."""


@keywords(ExpandOptions)
def expand(adapter: str | Path, *, progress: Progress | None = None, **options: Any) -> ExpandResult:
    """Turn an adapter into plain LoRA of the original model (`initial`), or into a full checkpoint.

    With `initial`, the adapter was trained from a start that is not zero (`basis init`: PiSSA, MiLoRA, OLoRA) on its
    residual. What it changed of the original model is s(BA − B₀A₀), a LoRA of twice the rank on the original base:
    A' = [A; A₀], B' = [B, −B₀]. Where singular values were trained (SVFit), it is B diag(v − σ) A, of the same rank.
    Without, the adapter is added to its base: a full checkpoint. A NOLA adapter becomes plain LoRA, for which its base
    is not needed, and a checkpoint where `base` is given.

        start = basiscli.init("org/model", method="pissa", rank=16)
        ...  # train start.adapter on start.residual with PEFT, and save it in "trained"
        basiscli.expand("trained", initial=start.adapter)  # ./trained-lora, on "org/model"

    Args:
        adapter: folder or Hub id of the trained adapter.
        progress: a progress display; none by default.
        **options: by name:

    Raises:
        UsageError, InputError, HubError, ResourceError: see `basiscli.errors`.
    """
    return run(ExpandOptions.of(adapter=adapter, **options), progress or Silent())


def run(options: ExpandOptions, progress: Progress) -> ExpandResult:
    """Do what the options ask for."""
    source = _adapter(options.adapter, "give a PEFT LoRA folder")
    name = source.label.rpartition("/")[2].partition("@")[0]
    lora = _as_lora(source, options.initial, options.base)
    if lora is not None:
        return _written(lora, options.output or Path(f"{name}-lora"), overwrite=options.overwrite)
    done = merge(
        [options.adapter],
        method="task_arithmetic",
        parameters={"lambda": 1.0},
        base=options.base,
        output=options.output or f"{name}-merged",
        overwrite=options.overwrite,
        progress=progress,
    )
    return ExpandResult(done.path, "checkpoint", done.report.weights_digest, len(Adapter(source).modules))


def _adapter(spec: str, remedy: str) -> Source:
    source = resolve(spec)
    if not source.is_adapter:
        raise InputError("not an adapter", file=source.path, remedy=remedy)
    return source


def _as_lora(source: Source, initial: str | None, base: str | None) -> PlainLoRA | None:
    """Return the plain LoRA that an adapter becomes; None for one that is to be added to its base."""
    if is_nola(source):
        if initial is not None:
            raise UsageError("a NOLA adapter begins at zero", file=source.path, remedy="leave out --initial")
        return CoefficientsAsLoRA(source) if base is None else None
    if initial is not None:
        start = _adapter(initial, "give the adapter that `basis init` made")
        return (ValuesAsLoRA if is_tinylora(source) else FactorsAsLoRA)(source, start, base)
    if is_tinylora(source):
        raise UsageError(
            "which trained values are whose, only the adapter says that their training began with",
            remedy="give it with --initial, for plain LoRA of the original model",
        )
    return None


def _written(lora: PlainLoRA, out: Path, *, overwrite: bool) -> ExpandResult:
    with closing(lora):
        folder = output_folder(out, lora.sources, overwrite=overwrite)
        digest = write_lora(lora, folder, overwrite=overwrite)
    return ExpandResult(folder, "adapter", digest, lora.modules)
