"""The report of an adapter that was compressed to coefficients of random bases."""

from __future__ import annotations

from datetime import UTC, datetime

from basiscli.checkpoints.digests import stored_digest, weights_digest
from basiscli.commands.nola.plan import NolaPlan
from basiscli.commands.nola.reproduce import nola_command
from basiscli.commands.nola.run import NolaRun, numbers_of
from basiscli.names import natural_key
from basiscli.reports.facts import checkpoint_record, common_license, license_of, peak_memory_bytes, versions
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

SOURCE = "Koohpayegani et al., 'NOLA', arXiv 2310.02556"


def build_nola_report(run: NolaRun, *, seconds: float) -> Report:
    """Return the report of a finished compression of an adapter; `seconds` is the whole command's, without planning."""
    plan, settings = run.plan, run.plan.settings
    written = {key: sha for entry in run.output.finished.values() for key, sha in entry["digests"].items()}
    specs = plan.layout.tensors
    sources = [_adapter_record(plan)]
    if plan.base is not None:
        sources.append(checkpoint_record("base", plan.base.source, plan.base.tensors.values(), {}))
    parameters: dict[str, object] = {
        "bases": plan.bases, "rank": plan.rank, "bits": plan.bits, "steps": settings.steps if plan.base else 0,
        "batch": settings.batch, "length": settings.length, "learning_rate": settings.learning_rate,
    }  # fmt: skip
    return Report(
        command="compress",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        method=MethodRecord(name="nola", parameters=parameters, source=SOURCE),
        sources=sources,
        reproduce=nola_command(plan),
        seed=settings.seed,
        notes=[*plan.notes, *common_license(sources)[1]],
        numbers=dict(numbers_of(run)),
        adapter=AdapterRecord(
            rank=plan.rank,
            alpha=plan.rank,
            rslora=False,
            exact=False,
            trains="coefficients",
            modules={
                m.name: ModuleRecord(rank=plan.rank, norm=run.norms[m.name], energy=run.shares[m.name])
                for m in plan.modules
            },
            calibration=CalibrationRecord(name=run.windows.name, tokens=run.windows.tokens, sha256=run.windows.sha256)
            if run.windows
            else None,
        ),
        kinds_found_by="names",
        weights_digest=weights_digest(specs.values(), written),
        tensors=[
            TensorRecord(
                name=s.name, kind="nola", dtype=s.dtype, shape=s.shape, sha256=written[s.name], action="factor"
            )
            for s in sorted(specs.values(), key=lambda t: natural_key(t.name))
        ],
        cost=Cost(
            seconds=round(seconds, 3),
            seconds_of={name: round(took, 3) for name, took in run.seconds.items()},
            peak_memory_bytes=peak_memory_bytes(),
            read_bytes=sum(t.nbytes for c in (plan.adapter.weights, plan.base) if c for t in c.tensors.values()),
            written_bytes=plan.layout.nbytes,
            workers=1,
            device=str(run.device),
            resumed_steps=0,
        ),
        versions=versions(),
    )


def _adapter_record(plan: NolaPlan) -> SourceRecord:
    source, stored = plan.adapter.source, plan.adapter.weights.tensors
    return SourceRecord(
        role="model",
        spec=source.spec,
        kind="adapter",
        repo_id=source.repo_id,
        revision=source.revision,
        license=license_of(source),
        digest=weights_digest(stored.values(), {name: stored_digest(tensor) for name, tensor in stored.items()}),
    )
