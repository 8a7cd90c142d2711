"""What transformers calls a KV cache: `cache` from 5.24 on, `past_key_values` before.

Asked of the model and of its output, not of a version: a model's own code may keep the old name for longer.
"""

from __future__ import annotations

import inspect
from typing import Any

_NAMES = ("cache", "past_key_values")  # the newest first


def given_cache(model: Any, cache: Any) -> dict[str, Any]:
    """Return a cache, or None for a new one, as the keyword argument that a model's forward takes."""
    parameters = inspect.signature(model.forward).parameters
    return {next((name for name in _NAMES if name in parameters), _NAMES[-1]): cache}


def cache_of(output: Any) -> Any:
    """Return the cache of a model's output; None without one."""
    return next((output[name] for name in _NAMES if name in output), None)
