"""Contents of a checkpoint or adapter, from its headers and JSON; without torch and without reading weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from basiscli.checkpoints.adapter import Adapter
from basiscli.checkpoints.header import TensorSpec
from basiscli.checkpoints.source import Source
from basiscli.checkpoints.tinylora import TrainedValues, is_tinylora
from basiscli.checkpoints.views import Checkpoint
from basiscli.hub.resolve import resolve
from basiscli.model.architecture import kind_by_name, layer_of
from basiscli.names import format_size, natural_key
from basiscli.reports.schema import read_report


@dataclass(frozen=True)
class Group:
    """Totals over the tensors of one kind."""

    kind: str
    tensors: int
    parameters: int
    nbytes: int
    dtypes: list[str]


@dataclass(frozen=True)
class Inspection:
    """The contents of a checkpoint or adapter."""

    kind: str
    """'checkpoint' or 'adapter'."""
    path: Path
    repo_id: str | None
    revision: str | None
    facts: dict[str, Any]
    """Architecture, layers, base and more, by their names, in the order to show them."""
    groups: list[Group]
    total: Group
    tensors: list[TensorSpec]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, for `--json`."""
        tensors = [
            {
                "name": t.name,
                "dtype": t.dtype,
                "shape": list(t.shape),
                "bytes": t.nbytes,
                "layer": layer_of(t.name),
            }
            for t in self.tensors
        ]
        return asdict(self) | {"path": str(self.path), "tensors": tensors}


def inspect(model: str | Path) -> Inspection:
    """Return the contents of a model from its headers; of a Hub model that is not cached, only headers are fetched.

    Args:
        model: folder, weights file, Hub id or LoRA adapter; the files may end where their data would begin.

    Raises:
        InputError, HubError: the model is missing or damaged.
    """
    source = resolve(str(model), headers_only=True)
    if is_tinylora(source):
        values = TrainedValues(source)
        facts, checkpoint, kind = _values_facts(values), values.weights, "adapter"
    elif source.is_adapter:
        adapter = Adapter(source)
        facts, checkpoint, kind = _adapter_facts(adapter), adapter.weights, "adapter"
    else:
        checkpoint = Checkpoint.open(source)
        facts, kind = _checkpoint_facts(checkpoint), "checkpoint"
    facts["files"] = len(checkpoint.files)
    facts |= _report_facts(source)
    tensors = sorted(checkpoint.tensors.values(), key=lambda t: natural_key(t.name))
    facts |= _absence(checkpoint, sum(tensor.nbytes for tensor in tensors))
    kinds: dict[str, list[TensorSpec]] = {}
    for tensor in tensors:
        form = next((form for form in ("tinylora", "lora") if f".{form}_" in tensor.name), None)
        name = form or str(kind_by_name(tensor) or "matrix")
        kinds.setdefault(name, []).append(tensor)
    groups = [
        _group(name, members) for name, members in sorted(kinds.items(), key=lambda kv: -sum(t.count for t in kv[1]))
    ]
    return Inspection(
        kind,
        source.path,
        source.repo_id,
        source.revision,
        facts,
        groups,
        _group("all", tensors),
        list(tensors),
    )


def _group(kind: str, tensors: Iterable[TensorSpec]) -> Group:
    members = list(tensors)
    return Group(
        kind,
        len(members),
        sum(t.count for t in members),
        sum(t.nbytes for t in members),
        sorted({t.dtype for t in members}),
    )


def _checkpoint_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config.get("text_config") or checkpoint.config
    layers = {number for name in checkpoint.tensors if (number := layer_of(name)) is not None}
    facts = {
        "architecture": ", ".join(checkpoint.config.get("architectures") or []) or None,
        "layers": len(layers) or None,
        "hidden size": config.get("hidden_size"),
        "attention heads": config.get("num_attention_heads"),
        "KV heads": config.get("num_key_value_heads"),
        "vocabulary": config.get("vocab_size"),
        "tied embeddings": config.get("tie_word_embeddings"),
        "quantised": (config.get("quantization_config") or {}).get("quant_method"),
        "remote code": True if "auto_map" in checkpoint.config else None,
        "base": checkpoint.source.base_model,
        "licence": checkpoint.source.card.get("license"),
    }
    return {name: fact for name, fact in facts.items() if fact is not None}


def _adapter_facts(adapter: Adapter) -> dict[str, Any]:
    config = adapter.config
    leaves = {module.rpartition(".")[2] for module in adapter.modules}
    facts = {
        "base": adapter.source.base_model,
        "rank": adapter.rank,
        "alpha": config.get("lora_alpha"),
        "rsLoRA": config.get("use_rslora") or None,
        "rank pattern": config.get("rank_pattern") or None,
        "alpha pattern": config.get("alpha_pattern") or None,
        "modules": len(adapter.modules),
        "targets": ", ".join(sorted(leaves)),
        "trained whole": ", ".join(sorted(adapter.replaced)) or None,
    }
    return {name: fact for name, fact in facts.items() if fact is not None}


def _values_facts(adapter: TrainedValues) -> dict[str, Any]:
    leaves = {module.rpartition(".")[2] for module in adapter.modules}
    facts = {
        "base": adapter.source.base_model,
        "trained": f"{adapter.rank} singular values a module",
        "modules": len(adapter.modules),
        "targets": ", ".join(sorted(leaves)),
    }
    return {name: fact for name, fact in facts.items() if fact is not None}


def _absence(checkpoint: Checkpoint, nbytes: int) -> dict[str, str]:
    """Return that the weights are not here, if so."""
    if checkpoint.source.is_remote:
        return {"to download": format_size(nbytes)}
    on_disk = sum(file.stat().st_size for file in checkpoint.files)
    return {"data": "not here: files end after their headers"} if on_disk < nbytes else {}


def _report_facts(source: Source) -> dict[str, Any]:
    report = read_report(source.folder)
    if report is None:
        return {}
    cache = {}
    if report.kv is not None:
        kv = report.kv
        size = f"{kv.bytes_per_token:,} of {kv.dense_bytes_per_token:,} bytes a token"
        cache = {"KV cache": f"{kv.kept:.1%} kept, {size}"}
    inputs = ", ".join(Path(s.spec).name or s.spec for s in report.sources if s.role != "base")
    return cache | {"made by": f"basis {report.command} --method {report.method.name} of {inputs}"}
