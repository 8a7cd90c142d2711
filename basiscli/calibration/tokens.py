"""Calibration text as windows of tokens of one length."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from basiscli.checkpoints.digests import digest
from basiscli.checkpoints.dtypes import raw_bytes
from basiscli.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

BUILT_IN = "built-in mix"
_ADVICE = "give more text with --calibration: a file, a folder, JSONL, or a safetensors file of tokens"
_TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".json", ".jsonl", ".html", ".c", ".js", ".tex", ".csv", ""}


@dataclass(frozen=True)
class Windows:
    """Windows of tokens of one length, in the order of the text."""

    ids: Tensor
    """[windows, length] int64."""
    labels: Tensor
    """The next token [windows, length] int64; −100 where none counts: at a window's end and in padding."""
    attention_mask: Tensor | None
    """[windows, length] int64, 0 for padding; None without padding."""
    name: str
    """Name of the text's file, or `built-in mix`."""
    sha256: str
    """Digest of the token ids."""
    counted: Tensor | None = None
    """Whose activations are summed, bool [windows, length]: not padding's nor masked tokens'; None for all."""

    @property
    def tokens(self) -> int:
        """Number of tokens, padding not counted."""
        return int(self.ids.numel() if self.attention_mask is None else self.attention_mask.sum())

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, indices: Tensor | slice | list[int]) -> Windows:
        """Return the windows of these indices."""
        mask = None if self.attention_mask is None else self.attention_mask[indices]
        counted = None if self.counted is None else self.counted[indices]
        return Windows(self.ids[indices], self.labels[indices], mask, self.name, self.sha256, counted)

    def spread(self, count: int) -> Windows:
        """Return at most `count` windows at equal distances: a text's subject may change from beginning to end."""
        count = min(count, len(self))
        return self.select([index * len(self) // count for index in range(count)])

    def shortened(self, length: int) -> Windows:
        """Return the windows cut to their first `length` tokens, at most."""
        mask = None if self.attention_mask is None else self.attention_mask[:, :length]
        counted = None if self.counted is None else self.counted[:, :length]
        labels = self.labels[:, :length].clone()
        labels[:, -1] = -100
        return Windows(self.ids[:, :length], labels, mask, self.name, self.sha256, counted)

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of a transformers model's forward: `input_ids`, and `attention_mask` where there is one."""
        return {"input_ids": self.ids} | (
            {} if self.attention_mask is None else {"attention_mask": self.attention_mask}
        )


def read_windows(path: str | Path | None, tokenizer: Any, length: int, vocabulary: int) -> Windows:
    """Return calibration text as windows of `length` tokens.

        windows = read_windows("text.jsonl", lambda: load_tokenizer(folder), 512, vocabulary=49152)
        model(**windows.select([0]).inputs)

    Args:
        path: a text file, a JSONL file with a `text` field, a folder of such files, a safetensors file with
            `input_ids` (and maybe `attention_mask` and `labels`), or None for the built-in mix.
        tokenizer: a function that returns the model's tokenizer; not called for a safetensors file.
        length: tokens per window.
        vocabulary: size of the model's; larger token ids are an error.

    Raises:
        InputError: no such file, no text in it, fewer tokens than one window, or token ids beyond the vocabulary.
    """
    import torch

    if path is not None and Path(path).suffix == ".safetensors":
        return _tokens_of_file(Path(path), length, vocabulary)
    name = BUILT_IN if path is None else Path(path).name
    texts = list(_built_in() if path is None else _texts(Path(path)))
    if not any(text.strip() for text in texts):
        raise InputError("no text in the calibration data", file=path, remedy=_ADVICE)
    tok = tokenizer()
    before, after = _frame(tok)
    end = None if after else tok.eos_token_id
    inner = length - len(before) - len(after)
    ids: list[int] = []
    for encoded in tok(texts, add_special_tokens=False, verbose=False)["input_ids"]:  # silent about long texts
        ids += encoded
        if end is not None:
            ids.append(end)
    if inner < 1 or len(ids) < inner:
        raise InputError(
            f"the calibration text has {len(ids)} tokens, fewer than one window of {length}", file=path, remedy=_ADVICE
        )
    windows = torch.tensor(ids[: len(ids) // inner * inner]).view(-1, inner)
    edges = [torch.tensor(part, dtype=torch.long).expand(len(windows), -1) for part in (before, after)]
    windows = torch.cat([edges[0], windows, edges[1]], 1)
    _check_vocabulary(windows, vocabulary, path)
    return Windows(windows, _next_tokens(windows), None, name, _digest(windows))


def _frame(tok: Any) -> tuple[list[int], list[int]]:
    """Return the special tokens that the model expects around a text: `<bos>` and none, `[CLS]` and `[SEP]`, or none.

    A model that was trained with a first token of its own is another model without it.
    """
    plain, whole = (tok("a", add_special_tokens=add)["input_ids"] for add in (False, True))
    start = next((n for n in range(len(whole)) if whole[n : n + len(plain)] == plain), 0)
    after = whole[start + len(plain) :]
    # An end of the text is put between texts, not into the middle of one; an encoder's separator ends every window.
    return whole[:start], after if tok.sep_token_id in after else []


def _digest(ids: Tensor) -> str:
    return digest([raw_bytes(ids.contiguous())])


def _next_tokens(ids: Tensor) -> Tensor:
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    return labels


def _check_vocabulary(ids: Tensor, vocabulary: int, path: str | Path | None) -> None:
    if int(ids.max()) >= vocabulary or int(ids.min()) < 0:
        raise InputError(
            f"token id {int(ids.max())} is outside the model's vocabulary of {vocabulary}",
            file=path,
            remedy="the tokens were made with another tokenizer: make them with this model's",
        )


def _built_in() -> Iterator[str]:
    for line in (files("basiscli.calibration") / "data" / "mix.jsonl").read_text(encoding="utf-8").split("\n"):
        if line:
            yield json.loads(line)["text"]


def _texts(path: Path) -> Iterator[str]:
    if not path.exists():
        raise InputError("no such calibration file", file=path, remedy="check the path")
    found = (
        sorted(f for f in path.rglob("*") if f.is_file() and f.suffix in _TEXT_SUFFIXES) if path.is_dir() else [path]
    )
    for file in found:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            if path.is_dir():
                continue
            raise InputError(f"not readable as UTF-8 text: {error}", file=file, remedy=_ADVICE) from error
        yield from _lines(file, text) if file.suffix == ".jsonl" else [text]


def _lines(file: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):  # other separators of lines may stand in a JSON string
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            found = record["text"] if "text" in record else "\n".join(m["content"] for m in record["messages"])
            if not isinstance(found, str):
                raise TypeError("the text is no string")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InputError(
                f"line {number}: neither a `text` nor `messages` with a `content`: {error}",
                file=file,
                remedy='write one {"text": "…"} a line',
            ) from error
        yield found


def _tokens_of_file(file: Path, length: int, vocabulary: int) -> Windows:
    import torch

    from basiscli.checkpoints.source import Source
    from basiscli.checkpoints.views import Checkpoint

    if not file.is_file():
        raise InputError("no such calibration file", file=file, remedy="check the path")
    stored = Checkpoint.open(Source(str(file), file))
    try:
        given = {
            name: stored.read(name) for name in ("input_ids", "attention_mask", "labels") if name in stored.tensors
        }
    finally:
        stored.close()
    ids = given.get("input_ids")
    if ids is None or ids.dim() != 2 or ids.is_floating_point() or not ids.numel():
        raise InputError(
            "no `input_ids` of shape [windows, tokens] in the calibration file",
            file=file,
            remedy="store integer tokens",
        )
    for name, other in given.items():
        if other.shape != ids.shape:
            raise InputError(
                f"{list(other.shape)} is not the shape of input_ids, {list(ids.shape)}",
                file=file,
                tensor=name,
                remedy="store one number a token",
            )
    ids = ids.long()
    mask = given["attention_mask"].long() if "attention_mask" in given else None
    _check_vocabulary(ids if mask is None else ids * mask, vocabulary, file)
    labels = _next_tokens(ids)
    if "labels" in given:  # as Trainer takes them: the token itself at its index, −100 where it does not count
        labels = torch.where(_next_tokens(given["labels"].long()) == -100, -100, labels)
    if mask is not None:
        labels = torch.where((mask * mask.roll(-1, 1)) == 1, labels, -100)
    counted = None if mask is None else mask == 1
    if "labels" in given:
        own = given["labels"] != -100
        counted = own if counted is None else counted & own
    windows = Windows(ids, labels, mask, file.name, _digest(ids), counted)
    windows = windows.shortened(length) if ids.shape[1] > length else windows
    if bool((windows.labels == -100).all()):
        raise InputError(
            "no token of the calibration file counts", file=file, remedy="check its attention_mask and labels"
        )
    return windows
