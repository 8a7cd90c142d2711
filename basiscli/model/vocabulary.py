"""Models with different tokenizers brought to one vocabulary: rows of embeddings and heads in a new order."""

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
"""In place of a row's number: another model's token, and the mean of the model's rows (padding)."""


@dataclass(frozen=True)
class Donor:
    """One row of another model's table."""

    checkpoint: Checkpoint
    row: int


@dataclass(frozen=True)
class RowMap:
    """Where each row of the new vocabulary comes from, for one model."""

    own: Sequence[int]
    """The model's own row, ABSENT or MEAN."""
    donors: Mapping[int, Sequence[Donor]] = field(default_factory=dict)
    """For absent rows the rows whose mean is taken; none: zeros."""


def token_tensors(checkpoint: Checkpoint) -> list[str]:
    """Return the names of tensors with one row a token: embedding, head, and the head's bias."""
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


class Revocabulated(Checkpoint):
    """A checkpoint whose tables of tokens have other rows; everything else is read as it is."""

    def __init__(self, checkpoint: Checkpoint, rows: RowMap) -> None:
        self._inner, self._rows = checkpoint, rows
        self._tables = frozenset(token_tensors(checkpoint))
        size = len(rows.own)
        tensors: dict[str, StoredTensor] = {
            name: replace(stored, shape=(size, *stored.shape[1:])) if name in self._tables else stored
            for name, stored in checkpoint.tensors.items()
        }
        super().__init__(checkpoint.source, checkpoint.files, tensors, renumbered(checkpoint.config, rows))
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
        """Close the files. The other models' are their owners' to close."""
        self._inner.close()
        super().close()

    def _mean_row(self, name: str) -> torch.Tensor:
        """Return the mean of the rows that are tokens, summed in float64."""
        tokens = sum(1 for row in self._rows.own if row != MEAN)
        blocks = (self.read(name, slice(i, min(i + 4096, tokens))).double().sum(0) for i in range(0, tokens, 4096))
        total: torch.Tensor = sum(blocks, start=self._inner.read(name, slice(0, 1))[0].double() * 0)
        return total / tokens


def renumbered(config: dict[str, Any], rows: RowMap) -> dict[str, Any]:
    """Return a configuration with the new size of the vocabulary, and with the new numbers of the tokens it names."""
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
        changed["text_config"] = renumbered(inner, rows)
    return config | changed


def renumbered_files(checkpoint: Checkpoint, rows: RowMap) -> dict[str, bytes]:
    """Return the files beside a checkpoint, its configuration apart, that name tokens by number, renumbered."""
    generation = read_json(checkpoint.source.folder / "generation_config.json")
    if not generation:
        return {}
    return {"generation_config.json": (json.dumps(renumbered(generation, rows), indent=2) + "\n").encode()}


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (first place, place after the last, first row) of stretches that lie side by side in the source."""
    begin = 0
    for place in range(1, len(rows) + 1):
        before = rows[place - 1]
        if place < len(rows) and before >= 0 and rows[place] == before + 1:
            continue
        yield begin, place, rows[begin]
        begin = place
