"""Verification of a checkpoint on disk: structure of its files, and digests against its report; without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from basiscli.checkpoints.adapter import Adapter
from basiscli.checkpoints.digests import file_digest, stored_digest, weights_digest
from basiscli.checkpoints.files import REPORT
from basiscli.checkpoints.header import StoredTensor
from basiscli.checkpoints.kv_file import BASES_FILE, CONFIG_FILE, read_kv_config
from basiscli.checkpoints.source import Source, models_in
from basiscli.checkpoints.tinylora import TrainedValues, is_tinylora
from basiscli.checkpoints.views import Checkpoint
from basiscli.errors import InputError
from basiscli.hub.resolve import resolve
from basiscli.progress import Progress, Silent
from basiscli.reports.schema import KVRecord, Report, read_report


@dataclass(frozen=True)
class Verification:
    """The result of a verification without errors."""

    path: Path
    tensors: int
    """How many were checked."""
    checked_digests: bool
    """Whether there was a report to check the bytes of every tensor against."""
    weights_digest: str | None
    report: str = REPORT

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, for `--json`."""
        return asdict(self) | {"path": str(self.path)}


def verify(model: str | Path, *, progress: Progress | None = None) -> Verification:
    """Check a model's files against their headers and its report; return only if all of it is right.

    Args:
        model: folder, weights file, Hub id or LoRA adapter; or the folder of `init` with adapter and residual.
        progress: a progress display; none by default.

    Raises:
        InputError: the first error: a damaged or missing file, a tensor too many or too few, or a digest that is not
            the report's.
    """
    source = resolve(str(model))
    tensors: dict[str, StoredTensor] = {}
    for path in models_in(source.path):
        tensors |= _weights(replace(source, path=path)).tensors
    report = read_report(source.folder)
    if report is None:
        return Verification(source.path, len(tensors), checked_digests=False, weights_digest=None)
    found = _check_digests(source.folder, tensors, report, progress or Silent())
    if report.kv is not None:
        _check_bases(source.folder, report.kv)
    return Verification(source.path, len(tensors), checked_digests=True, weights_digest=found)


def _weights(source: Source) -> Checkpoint:
    if not source.is_adapter:
        return Checkpoint.open(source)
    return TrainedValues(source).weights if is_tinylora(source) else Adapter(source).weights


def _check_bases(folder: Path, record: KVRecord) -> None:
    """Check the KV projection beside the weights."""
    config, file = read_kv_config(folder), folder / BASES_FILE
    again = "make or download the model again"
    if record.bases_sha256 is not None and file_digest(file) != record.bases_sha256:
        raise InputError("the bases are not those that were written (their digest differs)", file=file, remedy=again)
    if config is None or (config.key_ranks, config.value_ranks) != (record.key_ranks, record.value_ranks):
        raise InputError("the ranks are not those of the report", file=folder / CONFIG_FILE, remedy=again)


def _check_digests(folder: Path, tensors: Mapping[str, StoredTensor], report: Report, progress: Progress) -> str:
    recorded = {tensor.name: tensor for tensor in report.tensors}
    for name in sorted(recorded.keys() ^ tensors.keys()):
        what = (
            "is in the report and not in the weights" if name in recorded else "is in the weights and not in the report"
        )
        raise InputError(f"the tensor {what}", file=folder, tensor=name, remedy="make or download the model again")
    progress.start("verify", len(recorded), sum(t.nbytes for t in tensors.values()))
    digests = {}
    try:
        for name, stored in tensors.items():
            digests[name] = stored_digest(stored)
            record = recorded[name]
            if (digests[name], stored.dtype, stored.shape) != (record.sha256, record.dtype, record.shape):
                raise InputError(
                    "the tensor is not the one that was written (its digest differs)",
                    file=stored.file,
                    tensor=name,
                    remedy="make or download the model again",
                )
            progress.advance(stored.nbytes)
    finally:
        progress.stop()
    return weights_digest(tensors.values(), digests)
