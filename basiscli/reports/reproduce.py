"""Words of a command line, for the command that makes a result again in a folder that holds its inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel


def parameter_words(values: BaseModel) -> list[str]:
    """Return a method's parameters as the command line reads them: `["-p", "density=0.5"]`."""
    return [word for name, value in values for word in ("-p", f"{name}={_value(value)}")]


def seed_words(seed: int) -> list[str]:
    """Return `["--seed", "7"]`, and nothing for the default of 0."""
    return ["--seed", str(seed)] if seed else []


def file_name(place: str) -> str:
    """Return what a file or folder is called: where it lies on this machine is nobody else's business."""
    return Path(place).name


def number(value: float) -> str:
    """Return a number in full, without a `.0`: `0.6`, `2`."""
    return f"{value:.12g}"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
