"""Facts of a run and of its inputs that every report states."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from basiscli.checkpoints.digests import stored_digest, weights_digest
from basiscli.checkpoints.header import StoredTensor, TensorSpec
from basiscli.checkpoints.source import Source
from basiscli.reports.schema import SourceRecord
from basiscli.version import __version__


def peak_memory_bytes() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux; getrusage there also counts what the parent held before the exec
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    """Return the versions of basis, of Python and of the packages that computed the result, by name."""
    found = {"basiscli": __version__, "python": sys.version.split()[0]}
    for package in ("torch", "safetensors", "transformers", "peft"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def license_of(source: Source) -> str | None:
    """Return the licence that a model's card names: `apache-2.0`."""
    name = source.card.get("license")
    return name if isinstance(name, str) else None


def common_license(sources: Iterable[SourceRecord]) -> tuple[str | None, list[str]]:
    """Return the licence that all inputs share, and no warnings; where they differ, `other` and one."""
    found = sorted({source.license for source in sources if source.license})
    if len(found) > 1:
        return "other", [f"the inputs have different licences ({', '.join(found)}): check what their mixture allows"]
    return (found[0] if found else None), []


def checkpoint_record(
    role: Literal["base", "model"], source: Source, tensors: Iterable[StoredTensor], known: Mapping[str, str]
) -> SourceRecord:
    """Return the record of an input checkpoint, with the digest of its weights.

    Args:
        role: what it was to the run.
        source: where it is.
        tensors: what is stored there.
        known: SHA-256 of tensors that the run has read, by name; the others are read now.
    """
    stored = list(tensors)
    digests = {tensor.name: known.get(tensor.name) or stored_digest(tensor) for tensor in stored}
    return SourceRecord(
        role=role,
        spec=source.spec,
        kind="checkpoint",
        repo_id=source.repo_id,
        revision=source.revision,
        license=license_of(source),
        digest=weights_digest(stored, digests),
    )


def unchanged(inputs: Mapping[str, StoredTensor], outputs: Mapping[str, TensorSpec]) -> set[str]:
    """Return the names of the tensors whose bytes a copy leaves as they were: their dtype stays."""
    return {name for name, tensor in inputs.items() if name in outputs and outputs[name].dtype == tensor.dtype}
