"""The report of an adapter that was made from weights, and the adapter's configuration."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from basiscli.checkpoints.digests import weights_digest
from basiscli.checkpoints.files import RESIDUAL
from basiscli.checkpoints.nola import nola_config
from basiscli.checkpoints.source import is_hub_id
from basiscli.checkpoints.views import Checkpoint
from basiscli.commands.init.plan import InitPlan
from basiscli.commands.init.reproduce import init_command
from basiscli.commands.init.run import InitRun
from basiscli.model.architecture import kind_by_name
from basiscli.names import natural_key
from basiscli.reports.facts import checkpoint_record, common_license, peak_memory_bytes, unchanged, versions
from basiscli.reports.schema import (
    AdapterRecord,
    CalibrationRecord,
    Cost,
    MethodRecord,
    ModuleRecord,
    Report,
    TensorRecord,
)
from basiscli.transforms import Kind


def build_init_report(run: InitRun, *, seconds: float) -> Report:
    """Assemble the report of an initialisation or an extraction."""
    plan, journal = run.plan, run.output.finished
    specs = run.output.layout.tensors
    written = {key: sha for entry in journal.values() for key, sha in entry["digests"].items()}
    factors = {spec.name for name, rank in run.ranks.items() for spec in plan.factors(name, rank)}
    form = {"factors": "lora", "values": "tinylora", "coefficients": "nola"}[plan.method.trains]
    changed = set(plan.targets) if plan.has_residual else set()
    entries = [journal[name] for name in plan.targets]
    same = unchanged(plan.model.tensors, specs)
    copied = {name: written[name] for name in plan.copied if name in same}
    # The share of a whole: of squared norms, or of variances that stand for one each.
    whole = [entry["norm"] ** 2 if "norm" in entry else 1.0 for entry in entries]
    total = math.fsum(whole)
    ranks = run.ranks.values()
    numbers = {
        "tensors": float(len(specs)),
        "modules": float(sum(rank > 0 for rank in ranks)),
        "adapter_parameters": float(
            sum(ranks) if plan.trains_values else math.fsum(specs[key].count for key in factors)
        ),
        "rank_least": float(min(ranks)),
        "rank_most": float(max(ranks)),
        "energy": math.fsum(e["energy"] * part for e, part in zip(entries, whole, strict=True)) / total
        if total
        else 1.0,
        "energy_least": min(entry["energy"] for entry in entries),
    }
    if plan.has_residual:
        numbers["error_most"] = max(entry["error"] for entry in entries)
    if plan.quantize:
        numbers |= _nf4_numbers(entries)
    sources = [
        checkpoint_record(role, checkpoint.source, checkpoint.tensors.values(), known)
        for role, checkpoint, known in _inputs(plan, journal, copied)
    ]
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
        numbers=numbers,
        adapter=AdapterRecord(
            rank=_rank(run),
            alpha=plan.alpha_of(_rank(run)),
            rslora=plan.rslora,
            exact=plan.exact,
            trains=plan.method.trains,
            quantize=plan.quantize,
            modules={
                module: ModuleRecord(
                    rank=rank,
                    norm=entry.get("norm"),
                    energy=entry["energy"],
                    error=entry.get("error"),
                    spectrum=entry.get("spectrum"),
                    nf4_error=entry.get("nf4_error"),
                    nf4_error_qlora=entry.get("nf4_error_qlora"),
                )
                for module, rank, entry in zip(plan.targets.values(), ranks, entries, strict=True)
            },
            calibration=CalibrationRecord(name=run.windows.name, tokens=run.windows.tokens, sha256=run.windows.sha256)
            if run.windows
            else None,
        ),
        kinds_found_by="names",
        weights_digest=weights_digest(specs.values(), written),
        tensors=[
            TensorRecord(
                name=spec.name,
                kind=form if spec.name in factors else kind_by_name(spec) or Kind.OTHER,
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
            written_bytes=run.output.layout.nbytes,
            workers=plan.settings.workers,
            device=str(run.device),
            resumed_steps=run.output.resumed,
        ),
        versions=versions(),
    )


def _nf4_numbers(entries: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return Frobenius norms over all targets of the errors in NF4, and the share by which the start lowers it."""
    error, plain = (math.hypot(*(entry[key] for entry in entries)) for key in ("nf4_error", "nf4_error_qlora"))
    return {"nf4_error": error, "nf4_error_qlora": plain, "nf4_error_reduction": 1 - error / plain if plain else 0.0}


def _rank(run: InitRun) -> int:
    """Return what the adapter's configuration gives as `r`."""
    return run.plan.rank if run.plan.energy is None else max(run.ranks.values())


def part_of(report: Report, run: InitRun, folder: str) -> Report:
    """Return the report of one folder of the output: its tensors, and their digest."""
    names = {t.name for shard in run.output.layout.shards if shard.folder == f"{folder}/" for t in shard.tensors}
    tensors = [tensor for tensor in report.tensors if tensor.name in names]
    specs = [run.output.layout.tensors[tensor.name] for tensor in tensors]
    found = weights_digest(specs, {tensor.name: tensor.sha256 for tensor in tensors})
    return report.model_copy(update={"tensors": tensors, "weights_digest": found})


def peft_config(run: InitRun) -> bytes:
    """Return `adapter_config.json`: plain LoRA or TinyLoRA, loaded as it is and not initialised again."""
    plan = run.plan
    if plan.has_residual:
        base = str(plan.out / RESIDUAL)
    else:
        source = (plan.base or plan.model).source
        base = source.repo_id or (
            source.spec if is_hub_id(source.spec) and not Path(source.spec).exists() else str(source.path)
        )
    names = plan.model.config.get("architectures") or []
    causal = bool(names) and str(names[0]).endswith(("ForCausalLM", "LMHeadModel"))
    ranks = {plan.targets[name]: rank for name, rank in run.ranks.items() if rank}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": base,
        # Full names: a suffix could match a module that has no factors.
        "target_modules": list(ranks),
        "bias": "none",
        "fan_in_fan_out": plan.transposed,
        "inference_mode": True,
        "modules_to_save": None,
    }
    if plan.trains_coefficients:
        config = _nola_config(plan, config)
    else:
        config |= _values_config(plan.rank) if plan.trains_values else _lora_config(plan, _rank(run), ranks)
    return (json.dumps(config, indent=2) + "\n").encode()


def _lora_config(plan: InitPlan, rank: int, ranks: Mapping[str, int]) -> dict[str, Any]:
    alpha = plan.alpha_of(rank)
    return {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": plan.rslora,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "rank_pattern": {module: own for module, own in ranks.items() if own != rank},
        "alpha_pattern": {module: plan.alpha_of(own) for module, own in ranks.items() if plan.alpha_of(own) != alpha},
    }


def _nola_config(plan: InitPlan, lora: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {module: list(plan.linear_shape(name)[::-1]) for name, module in plan.targets.items()}
    return nola_config(
        sizes, base=lora["base_model_name_or_path"], task_type=lora["task_type"], rank=plan.rank,
        bases=plan.values.bases, alpha=plan.alpha_of(plan.rank), rslora=plan.rslora,  # type: ignore[attr-defined]
        seed=plan.settings.seed, transposed=plan.transposed,
    )  # fmt: skip


def _values_config(rank: int) -> dict[str, Any]:
    return {
        "peft_type": "TINYLORA",
        "r": rank,
        "u": rank,  # as many values as directions
        "weight_tying": 0.0,  # every module its own
        "save_projection": True,  # P says which value is whose; drawn again it would be random
        "tinylora_dropout": 0.0,
        "init_weights": True,
    }


def _inputs(
    plan: InitPlan, journal: Mapping[str, dict[str, Any]], copied: dict[str, str]
) -> Iterator[tuple[Literal["base", "model"], Checkpoint, dict[str, str]]]:
    """Yield each input with its role and the digests that are known of it: what was read, and what was copied."""
    read = {name: journal[name]["inputs"] for name in plan.targets if "inputs" in journal[name]}
    yield "model", plan.model, copied | {name: digests["0"] for name, digests in read.items()}
    if plan.base is not None:
        yield "base", plan.base, {name: digests["1"] for name, digests in read.items()}
