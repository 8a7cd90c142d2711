"""Where an output may go, and whether there is room for it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from basiscli.checkpoints.files import REPORT
from basiscli.checkpoints.shards import JOURNAL, partial_folder, replaced_folder
from basiscli.checkpoints.source import Source
from basiscli.errors import ResourceError, UsageError


def output_place(out: str | Path, inputs: Iterable[Source], *, overwrite: bool) -> Path:
    """Return where the result goes: never into an input, never over something that basis did not write."""
    place = Path(out).expanduser().resolve()
    partial, replaced = partial_folder(place), replaced_folder(place)
    for path in {source.path for source in inputs}:
        if path in {place, *place.parents}:
            raise UsageError(f"the output would lie inside an input: {place}", file=path, remedy="choose another -o")
        if {place, partial, replaced} & {path, *path.parents}:
            raise UsageError(f"the output would hold an input: {place}", file=path, remedy="choose another -o")
    for folder, mark in ((partial, JOURNAL), (replaced, REPORT)):
        if folder.exists() and not (folder / mark).is_file() and (folder.is_file() or any(folder.iterdir())):
            raise UsageError(
                f"{folder.name} is in the way and was not written by basis",
                file=folder,
                remedy="move it away, or choose another -o",
            )
    if place.is_file():
        raise UsageError("the output is a file", file=place, remedy="choose another -o")
    if place.is_dir() and any(place.iterdir()):
        if not overwrite:
            raise UsageError("the output exists", file=place, remedy="choose another -o, or add --overwrite")
        if not (place / REPORT).is_file():
            raise UsageError(
                "the output exists and was not written by basis: it is not overwritten",
                file=place,
                remedy="remove it yourself, or choose another -o",
            )
    return place


def check_disk(out: Path, needed: int, *, headers_only: bool = False) -> None:
    """Refuse an output of so many bytes where the disk has no room; what an interrupted run left counts as room.

    Nothing is refused that is planned on headers alone: where the disk is that its result would go to, nobody knows.
    """
    if headers_only:
        return
    parent = next(folder for folder in out.parents if folder.is_dir())
    partial = partial_folder(out)
    taken = sum(f.stat().st_size for f in partial.rglob("*") if f.is_file()) if partial.is_dir() else 0
    free = shutil.disk_usage(parent).free + taken
    if needed > free:
        raise ResourceError(
            f"not enough disk space: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free",
            file=parent,
            remedy="free some space or choose another -o",
        )
