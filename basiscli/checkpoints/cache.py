"""What basis keeps between commands: conversions to safetensors, and headers of models of the Hub.

The folder is `$BASIS_CACHE`, else `$XDG_CACHE_HOME/basis`, else `~/.cache/basis`. Everything in it can be made again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def cache_folder() -> Path:
    """Return the cache's folder; it need not exist."""
    given = os.environ.get("BASIS_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "basis"


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Return a folder of the cache; if it is not there, make it elsewhere and give it its name when it is complete.

    Args:
        folder: where it is, or will be.
        make: fills the folder that it is given, which is empty.
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
