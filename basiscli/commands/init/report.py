"""The report of an adapter that was made from weights or from data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from basiscli.checkpoints.digests import weights_digest
from basiscli.checkpoints.views import Checkpoint
from basiscli.commands.init.peft_config import config_rank
from basiscli.commands.init.plan import InitPlan
from basiscli.commands.init.reproduce import init_command
from basiscli.commands.init.run import Entry, InitRun
from basiscli.model.architecture import kind_by_name
from basiscli.model.names import found_by
from basiscli.names import natural_key
from basiscli.reports.facts import checkpoint_record, common_license, peak_memory_bytes, unchanged, versions
from basiscli.reports.schema import (
    AdapterRecord,
    CalibrationRecord,
    Cost,
    MethodRecord,
    ModuleRecord,
    Report,
    SourceRecord,
    TensorRecord,
)
from basiscli.transforms import Kind


def build_init_report(run: InitRun, *, seconds: float) -> Report:
    """Return the report of an initialisation or an extraction that took so many seconds."""
    plan = run.plan
    written = {key: sha for entry in run.output.finished.values() for key, sha in entry["digests"].items()}
    sources = _sources(run, written)
    return Report(
        command="init" if plan.base is None else "extract",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        method=MethodRecord(
            name=plan.method.name, parameters=plan.values.model_dump(mode="json"), source=plan.method.source
        ),
        sources=sources,
        reproduce=init_command(plan),
        seed=plan.settings.seed,
        notes=[*plan.notes, *common_license(sources)[1]],
        numbers=_numbers(run),
        adapter=_adapter(run),
        kinds_found_by=found_by(plan.base or plan.model),
        weights_digest=weights_digest(run.output.layout.tensors.values(), written),
        tensors=_tensors(run, written),
        cost=Cost(
            seconds=round(seconds, 3),
            peak_memory_bytes=peak_memory_bytes(),
            read_bytes=sum(t.nbytes for c in (plan.model, plan.base) if c for t in c.tensors.values()),
            written_bytes=run.output.layout.nbytes,
            workers=plan.settings.workers,
            device=str(run.device),
            resumed_steps=run.output.resumed,
        ),
        versions=versions(),
    )


def _entries(run: InitRun) -> list[Entry]:
    """Return the journal's entries of the targets, in their order."""
    return [run.output.finished[name] for name in run.plan.targets]


def _numbers(run: InitRun) -> dict[str, float]:
    """Return the numbers of the whole adapter."""
    plan, entries, ranks = run.plan, _entries(run), run.ranks.values()
    # The share of a whole: of squared norms, or of variances that stand for one each.
    whole = [entry["norm"] ** 2 if "norm" in entry else 1.0 for entry in entries]
    total = math.fsum(whole)
    held = math.fsum(entry["energy"] * part for entry, part in zip(entries, whole, strict=True))
    trained = [plan.format.trained_parameters(plan.modules[n], rank) for n, rank in run.ranks.items() if rank]
    numbers = {
        "tensors": float(len(run.output.layout.tensors)),
        "modules": float(sum(rank > 0 for rank in ranks)),
        "adapter_parameters": float(sum(trained)),
        "rank_least": float(min(ranks)),
        "rank_most": float(max(ranks)),
        "energy": held / total if total else 1.0,
        "energy_least": min(entry["energy"] for entry in entries),
    }
    if plan.has_residual:
        numbers["error_most"] = max(entry["error"] for entry in entries)
    return numbers | (_nf4_numbers(entries) if plan.quantize else {})


def _nf4_numbers(entries: Sequence[Entry]) -> dict[str, float]:
    """Return Frobenius norms over all targets of the errors in NF4, and the share by which the start lowers it."""
    error, plain = (math.hypot(*(entry[key] for entry in entries)) for key in ("nf4_error", "nf4_error_qlora"))
    return {"nf4_error": error, "nf4_error_qlora": plain, "nf4_error_reduction": 1 - error / plain if plain else 0.0}


def _adapter(run: InitRun) -> AdapterRecord:
    plan, rank, windows = run.plan, config_rank(run), run.windows
    modules = {
        plan.targets[name]: ModuleRecord(
            rank=run.ranks[name],
            norm=entry.get("norm"),
            energy=entry["energy"],
            error=entry.get("error"),
            spectrum=entry.get("spectrum"),
            nf4_error=entry.get("nf4_error"),
            nf4_error_qlora=entry.get("nf4_error_qlora"),
        )
        for name, entry in zip(plan.targets, _entries(run), strict=True)
    }
    return AdapterRecord(
        rank=rank,
        alpha=plan.alpha_of(rank),
        rslora=plan.rslora,
        exact=plan.exact,
        trains=plan.method.trains,
        quantize=plan.quantize,
        modules=modules,
        calibration=CalibrationRecord(name=windows.name, tokens=windows.tokens, sha256=windows.sha256)
        if windows
        else None,
    )


def _tensors(run: InitRun, written: Mapping[str, str]) -> list[TensorRecord]:
    """Return the record of every tensor of the output."""
    plan = run.plan
    of_adapter = {spec.name for name, rank in run.ranks.items() for spec in plan.adapter_tensors(name, rank)}

    def action(name: str) -> Literal["factor", "residual", "copied"]:
        if name in of_adapter:
            return "factor"
        return "residual" if name in plan.targets else "copied"

    return [
        TensorRecord(
            name=spec.name,
            kind=plan.format.kind if spec.name in of_adapter else kind_by_name(spec) or Kind.OTHER,
            dtype=spec.dtype,
            shape=spec.shape,
            sha256=written[spec.name],
            action=action(spec.name),
        )
        for spec in sorted(run.output.layout.tensors.values(), key=lambda spec: natural_key(spec.name))
    ]


def _sources(run: InitRun, written: Mapping[str, str]) -> list[SourceRecord]:
    """Return the records of the inputs; what was neither read nor copied as it is is read now, for its digest."""
    plan = run.plan
    same = unchanged(plan.model.tensors, run.output.layout.tensors)
    copied = {name: written[name] for name in plan.copied if name in same}
    return [
        checkpoint_record(role, checkpoint.source, checkpoint.tensors.values(), known)
        for role, checkpoint, known in _inputs(plan, run.output.finished, copied)
    ]


def _inputs(
    plan: InitPlan, journal: Mapping[str, dict[str, Any]], copied: Mapping[str, str]
) -> Iterator[tuple[Literal["base", "model"], Checkpoint, dict[str, str]]]:
    """Yield each input with its role and the digests that are known of it."""
    read = {name: journal[name]["inputs"] for name in plan.targets if "inputs" in journal[name]}
    yield "model", plan.model, {**copied, **{name: digests["0"] for name, digests in read.items()}}
    if plan.base is not None:
        yield "base", plan.base, {name: digests["1"] for name, digests in read.items()}
