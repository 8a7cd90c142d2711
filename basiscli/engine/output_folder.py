"""Checks of the output folder: its path is allowed, and its disk has space."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from basiscli.checkpoints.files import REPORT
from basiscli.checkpoints.shards import JOURNAL, partial_folder, replaced_folder
from basiscli.checkpoints.source import Source
from basiscli.errors import ResourceError, UsageError


def output_folder(out: str | Path, inputs: Iterable[Source], *, overwrite: bool) -> Path:
    """Return the absolute path of the output folder, checked against inputs and existing files. Nothing is created.

    Raises:
        UsageError: it would lie in an input or hold one, it exists (without `overwrite`), or basis did not write it.
    """
    folder = Path(out).expanduser().resolve()
    partial, replaced = partial_folder(folder), replaced_folder(folder)
    for path in {source.path for source in inputs}:
        if path in {folder, *folder.parents}:
            raise UsageError(f"the output would lie inside an input: {folder}", file=path, remedy="choose another -o")
        if {folder, partial, replaced} & {path, *path.parents}:
            raise UsageError(f"the output would hold an input: {folder}", file=path, remedy="choose another -o")
    for existing, mark in ((partial, JOURNAL), (replaced, REPORT)):
        if existing.exists() and not (existing / mark).is_file() and (existing.is_file() or any(existing.iterdir())):
            raise UsageError(
                f"{existing.name} is in the way and was not written by basis",
                file=existing,
                remedy="move it away, or choose another -o",
            )
    if folder.is_file():
        raise UsageError("the output is a file", file=folder, remedy="choose another -o")
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise UsageError("the output exists", file=folder, remedy="choose another -o, or add --overwrite")
        if not (folder / REPORT).is_file():
            raise UsageError(
                "the output exists and was not written by basis: it is not overwritten",
                file=folder,
                remedy="remove it yourself, or choose another -o",
            )
    return folder


def check_disk(out: Path, needed: int, *, headers_only: bool = False) -> None:
    """Raise if the disk of the output folder has less than the needed bytes free.

    The partial output of an interrupted run counts as free. A plan on headers alone is not checked: it is not run
    here.

    Raises:
        ResourceError: there is not enough space.
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
