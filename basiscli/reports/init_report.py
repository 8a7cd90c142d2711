"""The report of an adapter that was made from weights, and the adapter's configuration."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from basiscli.checkpoints.architecture import Kind, kind_by_name
from basiscli.checkpoints.digests import stored_digest, weights_digest
from basiscli.checkpoints.source import is_hub_id
from basiscli.checkpoints.views import Checkpoint
from basiscli.engine.init_plan import RESIDUAL, InitPlan
from basiscli.engine.init_run import InitRun
from basiscli.names import natural_key
from basiscli.reports.facts import license_of, peak_memory_bytes, versions
from basiscli.reports.schema import (
    AdapterRecord,
    Cost,
    MethodRecord,
    ModuleRecord,
    Report,
    SourceRecord,
    TensorRecord,
)


def build_init_report(run: InitRun, *, seconds: float) -> Report:
    """Assemble the report of an initialisation or an extraction."""
    plan, journal = run.plan, run.output.finished
    specs = plan.layout.tensors
    written = {key: sha for entry in journal.values() for key, sha in entry["digests"].items()}
    factors = {key for name in plan.targets for key in plan.keys(name)}
    changed = set(plan.targets) if plan.base is None else set()
    entries = [journal[name] for name in plan.targets]
    total = math.fsum(entry["norm"] ** 2 for entry in entries)
    numbers = {
        "tensors": float(len(specs)),
        "modules": float(len(plan.targets)),
        "adapter_parameters": float(sum(specs[key].count for key in factors)),
        "energy": math.fsum(e["energy"] * e["norm"] ** 2 for e in entries) / total if total else 1.0,
        "energy_least": min(entry["energy"] for entry in entries),
    }
    if plan.base is None:
        numbers["error_most"] = max(entry["error"] for entry in entries)
    return Report(
        command="init" if plan.base is None else "extract",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        method=MethodRecord(
            name=plan.method.name, parameters=plan.values.model_dump(mode="json"), source=plan.method.source
        ),
        sources=[
            _source(checkpoint, role, {name: journal[name]["inputs"][str(place)] for name in plan.targets})
            for place, (checkpoint, role) in enumerate(((plan.model, "model"), (plan.base, "base")))
            if checkpoint is not None
        ],
        seed=plan.settings.seed,
        notes=plan.notes,
        numbers=numbers,
        adapter=AdapterRecord(
            rank=plan.rank,
            alpha=plan.alpha,
            rslora=plan.rslora,
            exact=plan.exact,
            modules={
                module: ModuleRecord(
                    rank=plan.rank, norm=entry["norm"], energy=entry["energy"], error=entry.get("error")
                )
                for module, entry in zip(plan.targets.values(), entries, strict=True)
            },
        ),
        kinds_found_by="names",
        weights_digest=weights_digest(specs.values(), written),
        tensors=[
            TensorRecord(
                name=spec.name,
                kind="lora" if spec.name in factors else kind_by_name(spec) or Kind.OTHER,
                dtype=spec.dtype,
                shape=spec.shape,
                sha256=written[spec.name],
                action="factor" if spec.name in factors else "residual" if spec.name in changed else "copied",
            )
            for spec in sorted(specs.values(), key=lambda t: natural_key(t.name))
        ],
        cost=Cost(
            seconds=round(seconds, 3),
            peak_memory_bytes=peak_memory_bytes(),
            read_bytes=sum(t.nbytes for c in (plan.model, plan.base) if c for t in c.tensors.values()),
            written_bytes=plan.layout.nbytes,
            workers=plan.settings.workers,
            device=str(run.device),
            resumed_steps=run.output.resumed,
        ),
        versions=versions(),
    )


def part_of(report: Report, plan: InitPlan, folder: str) -> Report:
    """Return the report of one folder of the output: its tensors, and their digest."""
    names = {t.name for shard in plan.layout.shards if shard.folder == f"{folder}/" for t in shard.tensors}
    tensors = [tensor for tensor in report.tensors if tensor.name in names]
    specs = [plan.layout.tensors[tensor.name] for tensor in tensors]
    found = weights_digest(specs, {tensor.name: tensor.sha256 for tensor in tensors})
    return report.model_copy(update={"tensors": tensors, "weights_digest": found})


def lora_config(plan: InitPlan) -> bytes:
    """Return `adapter_config.json`: plain LoRA, loaded as it is and not initialised again."""
    if plan.base is None:
        base = str(plan.out / RESIDUAL)
    else:
        source = plan.base.source
        base = source.repo_id or (
            source.spec if is_hub_id(source.spec) and not Path(source.spec).exists() else str(source.path)
        )
    names = plan.model.config.get("architectures") or []
    causal = bool(names) and str(names[0]).endswith(("ForCausalLM", "LMHeadModel"))
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": base,
        # Full names: a suffix could match a module that has no factors.
        "target_modules": list(plan.targets.values()),
        "r": plan.rank,
        "lora_alpha": plan.alpha,
        "use_rslora": plan.rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": plan.transposed,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    return (json.dumps(config, indent=2) + "\n").encode()


def _source(checkpoint: Checkpoint, role: str, read: dict[str, str]) -> SourceRecord:
    source = checkpoint.source
    digests = {t.name: read.get(t.name) or stored_digest(t) for t in checkpoint.tensors.values()}
    return SourceRecord(
        role="base" if role == "base" else "model",
        spec=source.spec,
        kind="checkpoint",
        repo_id=source.repo_id,
        revision=source.revision,
        license=license_of(source),
        digest=weights_digest(checkpoint.tensors.values(), digests),
    )
