"""The files of a KV projection: `kv_projection.json` (ranks) and `kv_projection.safetensors` (bases).

All d columns of every basis are stored, in falling importance, so that another ratio needs only other ranks.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from basiscli.checkpoints.files import read_json
from basiscli.checkpoints.header import TensorSpec, encode_header
from basiscli.checkpoints.layout import METADATA
from basiscli.checkpoints.source import Source
from basiscli.checkpoints.views import Checkpoint
from basiscli.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_FILE = "kv_projection.json"
BASES_FILE = "kv_projection.safetensors"
FORMAT = 1
Prefill = Literal["compressed", "exact"]
"""Keys and values that a prompt attends to in its prefill; the cache is compressed either way."""
_AGAIN = "make the folder again with `basis compress`"


class KVConfig(BaseModel):
    """`kv_projection.json`: the rank of each head, and the method and training of the bases."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    format: int = FORMAT
    method: str
    parameters: dict[str, Any]
    head_dim: int
    levels: int
    """Ranks are multiples of head_dim / levels."""
    key_ranks: list[list[int]]
    """Kept dimensions of keys, [layers][KV heads]."""
    value_ranks: list[list[int]]
    """The same of values."""
    values_folded: bool = False
    """Whether the values' bases are folded into the weights of W_v and W_o."""
    trained_steps: int = 0
    trained_tokens: int = 0

    @property
    def kept(self) -> float:
        """Share of the cache's bytes that is kept."""
        ranks = [rank for layer in [*self.key_ranks, *self.value_ranks] for rank in layer]
        return sum(ranks) / (len(ranks) * self.head_dim)


@dataclass(frozen=True)
class KVBases:
    """A KV projection: configuration and bases."""

    config: KVConfig
    bases: Tensor
    """Orthogonal, float32 [layers, 2 (keys, values), KV heads, d, d], columns in falling importance."""
    energy: Tensor
    """Energy of each column over the calibration text, float32 [layers, 2, KV heads, d]."""

    def files(self) -> dict[str, bytes]:
        """Return the contents of both files by name."""
        from basiscli.checkpoints.dtypes import raw_bytes

        tensors = {}
        for layer, (bases, energy) in enumerate(zip(self.bases, self.energy, strict=True)):
            for kind, basis, strength in zip(("keys", "values"), bases, energy, strict=True):
                tensors[f"layers.{layer}.{kind}"] = basis.float().contiguous()
                tensors[f"layers.{layer}.{kind}.energy"] = strength.float().contiguous()
        header, _ = encode_header([TensorSpec(name, "F32", tuple(x.shape)) for name, x in tensors.items()], METADATA)
        data = b"".join([header, *(bytes(raw_bytes(x)) for x in tensors.values())])
        return {CONFIG_FILE: (self.config.model_dump_json(indent=1) + "\n").encode(), BASES_FILE: data}


def read_kv_config(folder: Path) -> KVConfig | None:
    """Return a folder's `kv_projection.json`; None where there is none.

    Raises:
        InputError: the file is damaged, of a newer format, or has ranks larger than a head.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        return None
    table = read_json(file)
    try:
        config = KVConfig.model_validate(table)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"the KV projection is damaged: {where}: {first['msg']}", file=file, remedy=_AGAIN) from error
    if config.format > FORMAT:
        raise InputError(f"KV projection of format {config.format}", file=file, remedy="update basis")
    heads = {len(layer) for layer in [*config.key_ranks, *config.value_ranks]}
    ranks = [rank for layer in [*config.key_ranks, *config.value_ranks] for rank in layer]
    fits = all(0 < rank <= config.head_dim for rank in ranks) and config.head_dim % max(config.levels, 1) == 0
    if (
        len(heads) != 1
        or len(config.key_ranks) != len(config.value_ranks)
        or not ranks
        or not fits
        or config.levels < 1
    ):
        raise InputError("the ranks fit no KV cache", file=file, remedy=_AGAIN)
    return config


def read_kv_bases(folder: Path) -> KVBases:
    """Return the KV projection in a folder, from both files.

    Raises:
        InputError: a file is missing or damaged, or a basis does not have the shape that the ranks imply.
    """
    import torch

    config = read_kv_config(folder)
    file = folder / BASES_FILE
    if config is None or not file.is_file():
        missing = folder / CONFIG_FILE if config is None else file
        raise InputError("no KV projection", file=missing, remedy="give a folder that `basis compress` made")
    layers, heads, dim = len(config.key_ranks), len(config.key_ranks[0]), config.head_dim
    with closing(Checkpoint.open(Source(str(file), file))) as stored:
        found: dict[str, list[Tensor]] = {"": [], ".energy": []}
        for layer in range(layers):
            for suffix, shape in (("", (heads, dim, dim)), (".energy", (heads, dim))):
                pair = []
                for kind in ("keys", "values"):
                    name = f"layers.{layer}.{kind}{suffix}"
                    spec = stored.tensors.get(name)
                    if spec is None or spec.shape != shape or spec.dtype != "F32":
                        raise InputError(
                            f"no float32 tensor of shape {list(shape)}", file=file, tensor=name, remedy=_AGAIN
                        )
                    pair.append(stored.read(name))
                found[suffix].append(torch.stack(pair))
    return KVBases(config, torch.stack(found[""]), torch.stack(found[".energy"]))
