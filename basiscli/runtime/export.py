"""A folder that plain transformers loads with the small cache: `from_pretrained(folder, trust_remote_code=True)`."""

from __future__ import annotations

import json
import re
from importlib.resources import files

from basiscli.errors import InputError

MODULE, CLASS = "modeling_basis_kv", "BasisKVForCausalLM"
AUTO_MAP = {"AutoModelForCausalLM": f"{MODULE}.{CLASS}"}
_HEADS = re.compile(r"^from basiscli\.runtime\.kv_heads import .*$", re.MULTILINE)
_MODELING = '''"""{architecture} with a KV cache of projection coefficients; made by `basis compress`.

Loaded by AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True). Every cache class of transformers holds
coefficients; without trust_remote_code the folder is the dense model.
"""

import json

from safetensors import safe_open
from transformers import {architecture}
from transformers.utils import cached_file

from .basis_kv_projection import KVProjection, attach

_HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


class {name}({architecture}):
    """The model; its attention modules have a `kv_projection` each."""

    @classmethod
    def from_pretrained(cls, place, *args, **kwargs):
        """Load the weights as {architecture} does, then the bases and ranks beside them."""
        hub = {{key: kwargs[key] for key in _HUB if kwargs.get(key) is not None}}
        loaded = super().from_pretrained(place, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        with open(cached_file(place, "kv_projection.json", **hub), encoding="utf-8") as file:
            config = json.load(file)
        projections = []
        with safe_open(cached_file(place, "kv_projection.safetensors", **hub), framework="pt") as bases:
            for layer, ranks in enumerate(zip(config["key_ranks"], config["value_ranks"])):
                keys, values = (bases.get_tensor(f"layers.{{layer}}.{{kind}}") for kind in ("keys", "values"))
                projections.append(KVProjection(keys, None if config["values_folded"] else values, *ranks))
        attach(model, projections)
        return loaded
'''


def exported_files(config: bytes) -> dict[str, bytes]:
    """Return the Python files to add, and the config that names them.

    The run-time module is copied, in one file: it imports nothing but torch and transformers.

    Raises:
        InputError: the config names no architecture.
    """
    table = json.loads(config)
    architectures = table.get("architectures")
    if not (isinstance(architectures, list) and architectures and str(architectures[0]).isidentifier()):
        raise InputError("the config names no architecture", remedy="leave out --export")
    table["auto_map"] = AUTO_MAP
    return {
        "config.json": (json.dumps(table, indent=2, sort_keys=True) + "\n").encode(),
        f"{MODULE}.py": _MODELING.format(architecture=architectures[0], name=CLASS).encode(),
        "basis_kv_projection.py": _runtime().encode(),
    }


def _runtime() -> str:
    """Return `kv_projection.py` with what it takes from `kv_heads.py` in the place of that import."""
    whole, heads = ((files("basiscli.runtime") / f"{name}.py").read_text() for name in ("kv_projection", "kv_heads"))
    taken = heads[heads.index("from collections.abc") :]  # without its docstring and what must be a file's first import
    return _HEADS.sub(lambda match: taken.rstrip(), whole, count=1)


def without_export(config: bytes) -> bytes:
    """Return a config that no longer names the Python files of an earlier export."""
    table = json.loads(config)
    if table.get("auto_map") != AUTO_MAP:
        return config
    del table["auto_map"]
    return (json.dumps(table, indent=2, sort_keys=True) + "\n").encode()
