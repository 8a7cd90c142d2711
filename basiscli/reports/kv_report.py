"""The report and the model card of a KV compression."""

from __future__ import annotations

from datetime import UTC, datetime

from basiscli.checkpoints.architecture import Kind, kind_by_name
from basiscli.checkpoints.digests import digest, weights_digest
from basiscli.checkpoints.dtypes import DTYPES
from basiscli.checkpoints.header import commonest_dtype
from basiscli.checkpoints.kv_file import KVConfig
from basiscli.engine.kv_plan import KVPlan
from basiscli.engine.kv_run import KVRun
from basiscli.names import natural_key
from basiscli.reports.card import metadata_of, render_card
from basiscli.reports.facts import checkpoint_record, peak_memory_bytes, unchanged, versions
from basiscli.reports.schema import (
    CalibrationRecord,
    Cost,
    KVRecord,
    MethodRecord,
    Report,
    TensorRecord,
)


def build_kv_report(run: KVRun, config: KVConfig, bases: bytes, *, seconds: float) -> Report:
    """Assemble the report of a KV compression; `bases` is the content of their file."""
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


def kv_card(plan: KVPlan, report: Report) -> bytes:
    """Return the model card."""
    assert report.kv is not None
    source = plan.model.source
    return render_card(
        "kv_card.md.jinja",
        metadata_of(source, "quantized", report, library="transformers", tag="kv-cache"),
        title=plan.out.name,
        source=source.label,
        report=report,
        kv=report.kv,
        dims=report.kv.kept * report.kv.head_dim,
        key_mean=_mean(report.kv.key_ranks),
        value_mean=_mean(report.kv.value_ranks),
        parameters=", ".join(f"{name} = {value}" for name, value in report.method.parameters.items()),
        command=kv_command(plan),
    )


def kv_command(plan: KVPlan) -> str:
    """Return the command that makes this compression."""
    settings = plan.settings
    words = ["basis", "compress", plan.model.source.label, "--kv-ratio", f"{plan.ratio:g}"]
    words += ["--method", plan.method.name] if plan.method.name != "matryoshka" else []
    words += [word for name, value in plan.values for word in ("-p", f"{name}={value}")]
    words += ["--calibration", settings.calibration.rpartition("/")[2]] if settings.calibration else []
    words += ["--train-steps", str(settings.train_steps), "--batch", str(settings.batch)]
    words += ["--length", str(settings.length), "--search", settings.search]
    words += ["--fold-v"] if settings.fold_values else []
    words += ["--export", settings.export] if settings.export else []
    words += ["--dtype", settings.dtype.lower()] if settings.dtype else []
    words += ["--seed", str(settings.seed)] if settings.seed else []
    return " ".join(words)


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


def _curve(losses: list[float]) -> list[float]:
    size = max(1, -(-len(losses) // 100))
    return [round(sum(part) / len(part), 5) for n in range(0, len(losses), size) if (part := losses[n : n + size])]


def _mean(ranks: list[list[int]]) -> float:
    return sum(map(sum, ranks)) / sum(map(len, ranks))
