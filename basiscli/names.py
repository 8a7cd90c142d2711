"""Sorting and formatting of tensor names, sizes, counts and numbers."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any

from basiscli.errors import UsageError

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return a sort key under which `layers.2` comes before `layers.10`."""
    # Numbers compare by their length and then as text: a hostile name's may be longer than Python reads.
    parts = ((part, part.lstrip("0")) for part in re.split(r"(\d+)", name))
    return tuple((0, len(digits), digits) if part.isdecimal() else (1, 0, part) for part, digits in parts)


def parse_size(text: str) -> int:
    """Return the bytes of '5GB', '500MiB' or '1000'.

    Raises:
        UsageError: the text is not a positive size.
    """
    match = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]*)\s*", text)
    try:
        size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise UsageError(f"not a size: '{text}'", remedy="for example 5GB or 500MB")
    return size


def format_size(size: float) -> str:
    """Return a size in bytes in decimal units, as disks and the Hub count: '538.1 MB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def format_count(count: int, thing: str) -> str:
    """Return '1 worker' or '2 workers'."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


def for_json(value: Any) -> Any:
    """Return plain data with the strings 'nan', 'inf' and '-inf' in place of those floats, which JSON lacks."""
    if isinstance(value, Mapping):
        return {str(key): for_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [for_json(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def seed_for(seed: int, name: str) -> int:
    """Return a 56-bit seed for one tensor that depends on the run's seed and the tensor's name alone."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=7).digest())


def printable(text: str) -> str:
    """Return text with everything but printable characters and line breaks escaped.

    Names and messages come from files that a stranger made; none may send escape sequences to a terminal, or turn a
    line of a page around.
    """
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
