"""The files of the output beside the weights: reports, the adapter's configuration and card, tokenizer and the like."""

from __future__ import annotations

from collections.abc import Mapping

from basiscli.checkpoints.digests import weights_digest
from basiscli.checkpoints.files import ADAPTER, ADAPTER_CONFIG, REPORT, RESIDUAL
from basiscli.checkpoints.layout import Layout
from basiscli.checkpoints.sidecars import sidecar_files
from basiscli.commands.init.card import adapter_card
from basiscli.commands.init.peft_config import peft_config
from basiscli.commands.init.run import InitRun
from basiscli.reports.schema import Report


def files_beside_weights(run: InitRun, report: Report) -> dict[str, bytes]:
    """Return the contents of files by their paths in the output folder.

    An extraction's output is the adapter's folder. An initialisation's holds `adapter/`, and maybe `residual/`, each
    with a report of its own, so that it can be moved and verified alone.
    """
    plan = run.plan
    adapter = {ADAPTER_CONFIG: peft_config(run), **adapter_card(plan, report)}
    if plan.base is not None:
        return {REPORT: report.as_file(), **adapter}
    files = {REPORT: report.as_file(), **_inside(ADAPTER, adapter)}
    files[f"{ADAPTER}/{REPORT}"] = _report_of(ADAPTER, report, run.output.layout)
    if plan.has_residual:
        files[f"{RESIDUAL}/{REPORT}"] = _report_of(RESIDUAL, report, run.output.layout)
        files |= _inside(RESIDUAL, sidecar_files(plan.model, plan.settings.dtype, code=False))
    return files


def _inside(folder: str, files: Mapping[str, bytes]) -> dict[str, bytes]:
    return {f"{folder}/{name}": content for name, content in files.items()}


def _report_of(folder: str, report: Report, layout: Layout) -> bytes:
    """Return the report of one folder of the output: its tensors, and their digest."""
    names = {t.name for shard in layout.shards if shard.folder == f"{folder}/" for t in shard.tensors}
    tensors = [tensor for tensor in report.tensors if tensor.name in names]
    specs = [layout.tensors[tensor.name] for tensor in tensors]
    found = weights_digest(specs, {tensor.name: tensor.sha256 for tensor in tensors})
    return report.model_copy(update={"tensors": tensors, "weights_digest": found}).as_file()
