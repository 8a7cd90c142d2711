"""The report of a merge, built from its journal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from basiscli.checkpoints.adapter_view import AdapterView, Model
from basiscli.checkpoints.digests import stored_digest, weights_digest
from basiscli.checkpoints.header import TensorSpec
from basiscli.checkpoints.source import Source
from basiscli.checkpoints.views import Checkpoint
from basiscli.commands.merge.as_adapter import factor_keys
from basiscli.commands.merge.reproduce import merge_command
from basiscli.commands.merge.run import MERGE, WRITE, MergeRun
from basiscli.names import natural_key
from basiscli.reports.facts import license_of, peak_memory_bytes, versions
from basiscli.reports.schema import (
    Continuation,
    Cost,
    MethodRecord,
    Report,
    SourceRecord,
    TaskVectorRecord,
    TensorRecord,
)

Journal = Mapping[str, dict[str, Any]]


def build_report(run: MergeRun, journal: Journal, *, seconds: float, seconds_merging: float) -> Report:
    """Return the report of a finished merge.

    Args:
        run: the run.
        journal: its entries by key, `merge:NAME` and `write:NAME`.
        seconds: of the whole command, without planning.
        seconds_merging: of the tensors alone.
    """
    plan = run.plan
    written = {name: sha for entry in journal.values() for name, sha in entry.get("digests", {}).items()}
    specs = plan.layout.tensors
    numbers = {
        "tensors": float(len(specs)),
        "parameters": float(sum(t.count for t in specs.values())),
        **run.numbers,
    }
    parameters = plan.parameters
    # The weight that each factor of an adapter belongs to; a checkpoint's tensors are their own.
    weight_of = {key: name for view in plan.views for name in view.modules for key in factor_keys(view, name)}
    return Report(
        command="merge",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        method=MethodRecord(name=plan.method.name, parameters=parameters, source=plan.method.source),
        sources=_sources(run, journal),
        reproduce=merge_command(plan),
        seed=plan.settings.seed,
        notes=plan.notes,
        numbers=numbers,
        task_vectors=_whole_model(run, journal),
        continuation=Continuation(
            method=plan.method.name, parameters=parameters, weights=plan.weights, numbers=run.numbers
        )
        if plan.method.onto_weight and plan.recipe is None  # a recipe's weights are of tensors, not of the whole model
        else None,
        kinds_found_by=run.kinds.found_by,
        weights_digest=weights_digest(specs.values(), written),
        tensors=[
            _tensor(run, journal, spec, weight_of.get(spec.name, spec.name), written[spec.name])
            for spec in sorted(specs.values(), key=_by_name)
        ],
        cost=Cost(
            seconds=round(seconds, 3),
            seconds_merging=round(seconds_merging, 3),
            peak_memory_bytes=peak_memory_bytes(),
            read_bytes=plan.read_bytes,
            written_bytes=plan.write_bytes,
            workers=plan.settings.workers,
            device=str(run.device),
            resumed_steps=run.output.resumed,
        ),
        versions=versions(),
    )


def _sources(run: MergeRun, journal: Journal) -> list[SourceRecord]:
    plan = run.plan
    if plan.recipe is not None:
        whole = {
            model.source: (model, _read_digests(journal, str(index)))
            for index, model in [*enumerate(plan.models), (-1, plan.base)]
            if model is not None and not (isinstance(model, Checkpoint) and model.is_assembled)
        }
        return [
            _source(role, whole[source][0], None, whole[source][1]) if source in whole else _named(role, source)
            for role, source in plan.recipe.sources
        ]
    records = []
    if plan.base is not None:
        records.append(_source("base", plan.base, None, _read_digests(journal, "-1") | _copied_digests(journal)))
    for index, (model, weight) in enumerate(zip(plan.models, plan.weights, strict=True)):
        role = "onto" if plan.history is not None and index == 0 else "model"
        records.append(_source(role, model, weight, _read_digests(journal, str(index))))
    return records


def _source(role: Any, model: Model, weight: float | None, read: Mapping[str, str]) -> SourceRecord:
    source = model.source
    stored = model.adapter.weights.tensors if isinstance(model, AdapterView) else model.tensors
    # What the merge had no reason to read (an adapter's factors, buffers) is small and read here. A base that was not
    # read at all, as for an adapter of adapters, has no digest: reading it would be most of the work.
    sha256 = {t.name: read.get(t.name) or stored_digest(t) for t in stored.values()} if read or role != "base" else {}
    return SourceRecord(
        role=role,
        spec=source.spec,
        kind="adapter" if isinstance(model, AdapterView) else "checkpoint",
        repo_id=source.repo_id,
        revision=source.revision,
        license=license_of(source),
        weight=weight,
        digest=weights_digest(stored.values(), sha256) if sha256 else None,
    )


def _named(role: Any, source: Source) -> SourceRecord:
    """Return the record of a model of which a recipe used parts."""
    kind: Any = "adapter" if source.is_adapter else "checkpoint"
    return SourceRecord(
        role=role, spec=source.spec, kind=kind, repo_id=source.repo_id, revision=source.revision,
        license=license_of(source),
    )  # fmt: skip


def _read_digests(journal: Journal, index: str) -> dict[str, str]:
    return {
        key.partition(":")[2]: entry["inputs"][index]
        for key, entry in journal.items()
        if index in entry.get("inputs", {})
    }


def _copied_digests(journal: Journal) -> dict[str, str]:
    return {n: sha for entry in journal.values() if entry.get("copied") for n, sha in entry["digests"].items()}


def _whole_model(run: MergeRun, journal: Journal) -> TaskVectorRecord | None:
    if run.plan.recipe is not None and any(isinstance(m, Checkpoint) and m.is_assembled for m in run.plan.models):
        return None  # of layers of several models
    recipe, models = run.plan.recipe, [model.source for model in run.plan.models]
    if recipe is not None and [source for role, source in recipe.sources if role != "base"] != models:
        return None  # made of parts of several models: a task vector is not one of theirs
    entries = [entry for name in run.plan.merged if "gram" in (entry := journal.get(f"{MERGE}:{name}", {}))]
    if not entries:
        return None
    indices = range(len(run.plan.models))
    total = [[math.fsum(entry["gram"][i][j] for entry in entries) for j in indices] for i in indices]
    scale = run.numbers.get("scale", 1.0)
    merged = math.sqrt(math.fsum(entry["merged"] for entry in entries))
    return TaskVectorRecord(norms=_norms(total), cosines=_cosines(total), merged_norm=scale * merged)


def _tensor(run: MergeRun, journal: Journal, spec: TensorSpec, name: str, sha256: str) -> TensorRecord:
    """Return the record of one stored tensor; `name` is the weight that the journal knows it by."""
    entry = journal.get(f"{MERGE}:{name}", {})
    copied = entry.get("copied", False) or (journal.get(f"{WRITE}:{name}", {}).get("copied", False))
    record: dict[str, Any] = {}
    if "gram" in entry:
        base = journal.get(f"{WRITE}:{name}", entry).get("base")
        record = {
            "base_norm": None if base is None else math.sqrt(base),
            "norms": _norms(entry["gram"]),
            "cosines": _cosines(entry["gram"]),
            "merged_norm": run.numbers.get("scale", 1.0) * math.sqrt(max(entry["merged"], 0.0)),
            "r": entry.get("r"),
        }
    return TensorRecord(
        name=spec.name,
        kind=run.kinds.by_name[name],
        dtype=spec.dtype,
        shape=spec.shape,
        sha256=sha256,
        action="copied" if copied else "merged",
        **record,
    )


def _norms(gram: Sequence[Sequence[float]]) -> list[float]:
    return [math.sqrt(max(gram[i][i], 0.0)) for i in range(len(gram))]


def _cosines(gram: Sequence[Sequence[float]]) -> list[list[float | None]]:
    """Return cosines; None where a vector is zero and has no direction."""
    norms = _norms(gram)
    indices = range(len(gram))
    return [[gram[i][j] / (norms[i] * norms[j]) if norms[i] * norms[j] > 0 else None for j in indices] for i in indices]


def _by_name(tensor: TensorSpec) -> Any:
    return natural_key(tensor.name)
