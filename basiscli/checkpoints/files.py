"""File names of checkpoints and adapters, and reading of their JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from basiscli.errors import InputError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
REPORT = "basis_report.json"
"""Name of the report in every output folder; a folder without it was not written by basis."""
ADAPTER, RESIDUAL = "adapter", "residual"
"""Sub-folders of the two models that `basis init` writes."""
_MOST_JSON = 200_000_000  # an index of a million tensors; more would only fill the memory


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file, {} if the file does not exist.

    Raises:
        InputError: the file is not a JSON object, is too large, or is a link out of its folder.
    """
    if not file.is_file():
        return {}
    if leads_out(file):
        raise InputError("a link that leads out of the folder", file=file, remedy="put the file itself in its place")
    if file.stat().st_size > _MOST_JSON:
        raise InputError(f"more than {_MOST_JSON // 10**6} MB of JSON", file=file, remedy="restore the file")
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"not valid JSON: {error}", file=file, remedy="restore the file") from error
    if not isinstance(table, dict):
        raise InputError("not a JSON object", file=file, remedy="restore the file")
    return table


def leads_out(file: Path) -> bool:
    """Return whether a file is a link to one outside of its folder.

    Such links, in a folder that a stranger made, would carry files of this machine into what is written and pushed. The
    Hub's cache is made of links to its blobs; these count as inside.
    """
    real = file.resolve()
    inside = [file.parent]
    for snapshot in file.parents:
        if snapshot.parent.name == "snapshots":
            inside += [snapshot.parents[1] / "blobs", snapshot.parents[2] / "blobs"]  # of the model, of the whole cache
    return not any(real.is_relative_to(folder.resolve()) for folder in inside)
