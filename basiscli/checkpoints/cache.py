"""The cache folder of basis: conversions to safetensors, and headers of models on the Hub.

The folder is `$BASIS_CACHE`, else `$XDG_CACHE_HOME/basis`, else `~/.cache/basis`. Everything in it can be made again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def cache_folder() -> Path:
    """Return the path of the cache folder, which need not exist."""
    given = os.environ.get("BASIS_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "basis"


def cached(folder: Path, make: Callable[[Path], None]) -> Path:
    """Return a cached folder, making it first if it does not exist; other processes never see it incomplete.

        cached(cache_folder() / "converted" / key, lambda folder: convert(file, folder))

    Args:
        folder: its path.
        make: fills an empty folder, which then gets that path.
    """
    if folder.is_dir():
        return folder
    scratch = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        make(scratch)
        os.replace(scratch, folder)  # noqa: PTH105 - of two processes, the one that loses finds a full folder
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder
