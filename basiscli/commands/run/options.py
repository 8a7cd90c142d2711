"""The options of `basis run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from basiscli.cli.fields import argument, option
from basiscli.cli.options import (
    AllowMissing,
    AllowNonfinite,
    Device,
    HeadersOnly,
    Memory,
    Overwrite,
    Plugins,
    Resume,
    Seed,
    ShardSize,
    Storage,
    TrustRemoteCode,
    Workers,
)


class RunOptions(
    Storage, AllowNonfinite, AllowMissing, TrustRemoteCode, Plugins, Device, ShardSize, Workers, Memory, Seed, Resume,
    Overwrite, HeadersOnly,
):  # fmt: skip
    """Options of `basis run` and keywords of `basiscli.run`; most are about a merge in mergekit's format."""

    recipe: Annotated[Path, argument("A YAML file: steps, or a merge in mergekit's format.")]
    output: Annotated[Path | None, option("Folder to make.", "-o", default="called as the recipe, here")] = None
