"""Names of the files that make up checkpoints and adapters, and reading their JSON."""

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
"""What basis says of its own output, in that folder; a folder without it was not written by basis."""
ADAPTER, RESIDUAL = "adapter", "residual"
"""The two models in a folder that `basis init` made."""
_MOST_JSON = 200_000_000  # an index of a million tensors; more would only fill the memory


def read_json(file: Path) -> dict[str, Any]:
    """Return a JSON object from a file; an absent file is an empty table.

    Raises:
        InputError: if the file is there and holds anything but a JSON object.
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
    """Return whether a file is really one outside of its folder.

    Such links, in a folder that a stranger made, would carry files of this machine into what is written and pushed. The
    Hub's cache is made of links to its blobs; these count as inside.
    """
    real = file.resolve()
    inside = [file.parent]
    for snapshot in file.parents:
        if snapshot.parent.name == "snapshots":
            inside += [snapshot.parents[1] / "blobs", snapshot.parents[2] / "blobs"]  # of the model, of the whole cache
    return not any(real.is_relative_to(folder.resolve()) for folder in inside)
