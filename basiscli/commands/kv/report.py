"""The report of a KV compression."""

from __future__ import annotations

from datetime import UTC, datetime

import torch
from torch import Tensor

from basiscli.checkpoints.digests import digest, weights_digest
from basiscli.checkpoints.dtypes import DTYPES
from basiscli.checkpoints.header import commonest_dtype
from basiscli.checkpoints.kv_file import KVBases
from basiscli.commands.kv.plan import KVPlan
from basiscli.commands.kv.reproduce import kv_command
from basiscli.commands.kv.run import KVRun
from basiscli.model.architecture import kind_by_name
from basiscli.names import natural_key
from basiscli.reports.facts import checkpoint_record, peak_memory_bytes, unchanged, versions
from basiscli.reports.schema import (
    CalibrationRecord,
    Cost,
    KVRecord,
    MethodRecord,
    Report,
    TensorRecord,
)
from basiscli.transforms import Kind


def build_kv_report(run: KVRun, projection: KVBases, bases: bytes, *, seconds: float) -> Report:
    """Return the report of a finished KV compression.

    Args:
        run: the run.
        projection: its bases and ranks.
        bases: content of the bases' file, for its digest.
        seconds: of the whole command, without planning.
    """
    config, (key_energy, value_energy) = projection.config, _energy(projection.energy)
    plan, source = run.plan, run.plan.model.source
    specs = plan.layout.tensors
    entries = {name: run.output.finished[name] for name in specs}
    written = {name: entry["digests"][name] for name, entry in entries.items()}
    same = unchanged(plan.model.tensors, specs)
    copied = {name: written[name] for name, entry in entries.items() if entry["action"] == "copied" and name in same}
    element = DTYPES[commonest_dtype(specs.values())].bits // 8
    dense = plan.shape.cache_bytes(element)
    numbers = {
        "tensors": float(len(specs)),
        "parameters": float(sum(t.count for t in specs.values())),
        "cache_kept": config.kept,
        "cache_removed": 1 - config.kept,
        **run.numbers,
    }
    return Report(
        command="compress",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        method=MethodRecord(name=config.method, parameters=config.parameters, source=plan.method.source),
        sources=[checkpoint_record("model", source, plan.model.tensors.values(), copied)],
        reproduce=kv_command(plan),
        seed=plan.settings.seed,
        notes=plan.notes,
        numbers=numbers,
        kv=KVRecord(
            key_ranks=config.key_ranks,
            value_ranks=config.value_ranks,
            head_dim=config.head_dim,
            kept=config.kept,
            bytes_per_token=round(dense * config.kept),
            dense_bytes_per_token=dense,
            key_energy=key_energy,
            value_energy=value_energy,
            values_folded=config.values_folded,
            search=plan.settings.search,
            trained_steps=config.trained_steps,
            trained_tokens=config.trained_tokens,
            losses=_curve(run.losses),
            calibration=CalibrationRecord(name=run.windows.name, tokens=run.windows.tokens, sha256=run.windows.sha256)
            if run.windows
            else None,
            bases_sha256=digest([bases]),
            engines=_engines(plan),
        ),
        kinds_found_by="names",
        weights_digest=weights_digest(specs.values(), written),
        tensors=[
            TensorRecord(
                name=spec.name,
                kind=kind_by_name(spec) or Kind.OTHER,
                dtype=spec.dtype,
                shape=spec.shape,
                sha256=written[spec.name],
                action=entries[spec.name]["action"],
            )
            for spec in sorted(specs.values(), key=lambda t: natural_key(t.name))
        ],
        cost=Cost(
            seconds=round(seconds, 3),
            seconds_of={name: round(value, 4) for name, value in run.seconds.items()},
            peak_memory_bytes=peak_memory_bytes(),
            read_bytes=sum(t.nbytes for t in plan.model.tensors.values()),
            written_bytes=plan.layout.nbytes,
            workers=plan.settings.workers,
            device=str(run.device),
            resumed_steps=run.output.resumed,
        ),
        versions=versions(),
    )


def _engines(plan: KVPlan) -> dict[str, str]:
    dense = "the dense model in rotated coordinates, its cache as large as before" if plan.folds else "the dense model"
    remote = (
        "the small cache, with trust_remote_code=True"
        if plan.settings.export
        else f"{dense}; with `--export remote-code` also the small cache"
    )
    return {
        "basiscli.load": "the small cache in generate and in forwards",
        "transformers": remote,
        "vLLM, SGLang, llama.cpp": f"{dense}: their caches hold whole heads",
    }


def _energy(energy: Tensor) -> tuple[list[float], list[float]]:
    """Return the mean share of the energy that each column holds, of the keys' bases and of the values'."""
    shares = energy / energy.sum(-1, keepdim=True).clamp_min(torch.finfo(energy.dtype).tiny)
    keys, values = shares.mean((0, 2)).tolist()
    return [float(f"{share:.6g}") for share in keys], [float(f"{share:.6g}") for share in values]


def _curve(losses: list[float]) -> list[float]:
    size = max(1, -(-len(losses) // 100))
    return [round(sum(part) / len(part), 5) for n in range(0, len(losses), size) if (part := losses[n : n + size])]
