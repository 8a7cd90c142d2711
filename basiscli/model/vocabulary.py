"""Models with different tokenizers brought to one vocabulary: embeddings and heads with reordered rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from basiscli.checkpoints.files import read_json
from basiscli.checkpoints.header import StoredTensor
from basiscli.checkpoints.views import Checkpoint
from basiscli.errors import InputError
from basiscli.model.architecture import layer_of

if TYPE_CHECKING:
    import torch

_TABLES = {
    "embed_tokens", "embed_in", "wte", "shared", "word_embeddings", "tok_embeddings", "token_embedding",
    "lm_head", "embed_out", "decoder", "predictions",
}  # fmt: skip
_IDS = {"bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "sep_token_id", "cls_token_id"}
ABSENT, MEAN = -1, -2
"""In end of a row index in `RowMap.own`: a token of other models, and the mean of the model's rows (padding)."""


@dataclass(frozen=True)
class Donor:
    """One row of another model's embedding (and head)."""

    checkpoint: Checkpoint
    row: int


@dataclass(frozen=True)
class RowMap:
    """The source of each row of one model's embedding in the new vocabulary."""

    own: Sequence[int]
    """By new token id: the model's own row index, ABSENT or MEAN."""
    donors: Mapping[int, Sequence[Donor]] = field(default_factory=dict)
    """By new token id, for ABSENT rows: the rows to average; zeros without any."""


def token_tensors(checkpoint: Checkpoint) -> list[str]:
    """Return the names of tensors with one row per token: embedding, head, and the head's bias.

    Raises:
        InputError: there is none with as many rows as the config's `vocab_size`.
    """
    rows, found = checkpoint.vocabulary_size, []
    for name, tensor in checkpoint.tensors.items():
        module = name.rpartition(".")[0].rpartition(".")[2]
        if module in _TABLES and layer_of(name) is None and tensor.shape and tensor.shape[0] == rows:
            found.append(name)
    if not found:
        raise InputError(
            f"no embedding of {rows} rows, as the config's vocab_size says",
            file=checkpoint.source.folder / "config.json",
            remedy="leave the tokenizer out of the recipe, or mend the config",
        )
    return found


class ReindexedCheckpoint(Checkpoint):
    """A checkpoint with another vocabulary: embedding and head rows follow a `RowMap`, all else is unchanged."""

    def __init__(self, checkpoint: Checkpoint, rows: RowMap) -> None:
        self._inner, self._rows = checkpoint, rows
        self._tables = frozenset(token_tensors(checkpoint))
        size = len(rows.own)
        tensors: dict[str, StoredTensor] = {
            name: replace(stored, shape=(size, *stored.shape[1:])) if name in self._tables else stored
            for name, stored in checkpoint.tensors.items()
        }
        super().__init__(checkpoint.source, checkpoint.files, tensors, with_new_token_ids(checkpoint.config, rows))
        self._mean = cache(self._mean_row)

    def read(self, name: str, rows: slice | None = None, *, pinned: bool = False) -> torch.Tensor:
        """Return a tensor, or rows of it; see `Checkpoint.read`."""
        if name not in self._tables:
            return super().read(name, rows, pinned=pinned)
        import torch

        first, last, _ = (rows or slice(None)).indices(len(self._rows.own))
        like = self._inner.read(name, slice(0, 0))
        values = torch.zeros((last - first, *like.shape[1:]), dtype=like.dtype, pin_memory=pinned)
        for begin, end, source in _runs(self._rows.own[first:last]):
            if source >= 0:
                values[begin:end] = self._inner.read(name, slice(source, source + end - begin))
            elif source == MEAN:
                values[begin:end] = self._mean(name)
            elif donors := self._rows.donors.get(first + begin):
                given = [donor.checkpoint.read(name, slice(donor.row, donor.row + 1)).float() for donor in donors]
                values[begin:end] = sum(given) / len(given)
        return values

    def close(self) -> None:
        """Close this checkpoint's files, not those of donors."""
        self._inner.close()
        super().close()

    def _mean_row(self, name: str) -> torch.Tensor:
        """Return the mean of the rows that are tokens, summed in float64."""
        tokens = sum(1 for row in self._rows.own if row != MEAN)
        blocks = (self.read(name, slice(i, min(i + 4096, tokens))).double().sum(0) for i in range(0, tokens, 4096))
        total: torch.Tensor = sum(blocks, start=self._inner.read(name, slice(0, 1))[0].double() * 0)
        return total / tokens


def with_new_token_ids(config: dict[str, Any], rows: RowMap) -> dict[str, Any]:
    """Return a configuration with the new `vocab_size`, and new ids of the tokens that it names (`eos_token_id`, …)."""
    new_of = {old: new for new, old in enumerate(rows.own) if old >= 0}
    changed = {
        key: [new_of.get(one, one) for one in value] if isinstance(value, list) else new_of.get(value, value)
        for key, value in config.items()
        if key in _IDS
    }
    if "vocab_size" in config:
        changed["vocab_size"] = len(rows.own)
    inner = config.get("text_config")
    if isinstance(inner, dict):
        changed["text_config"] = with_new_token_ids(inner, rows)
    return config | changed


def files_with_new_token_ids(checkpoint: Checkpoint, rows: RowMap) -> dict[str, bytes]:
    """Return generation_config.json with new token ids, as bytes by file name; empty where the checkpoint has none."""
    generation = read_json(checkpoint.source.folder / "generation_config.json")
    if not generation:
        return {}
    return {"generation_config.json": (json.dumps(with_new_token_ids(generation, rows), indent=2) + "\n").encode()}


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, end, first source row) of new rows begin … end − 1 whose sources are consecutive."""
    begin = 0
    for end in range(1, len(rows) + 1):
        before = rows[end - 1]
        if end < len(rows) and before >= 0 and rows[end] == before + 1:
            continue
        yield begin, end, rows[begin]
        begin = end
