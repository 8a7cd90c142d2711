"""Calibration data of every kind becomes windows of tokens, and what cannot is refused with its reason."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing

from basiscli.calibration.tokens import BUILT_IN, Windows, read_windows
from basiscli.errors import InputError
from basiscli.runtime.load import load_tokenizer
from tests.kv_models import END, VOCABULARY, byte_tokenizer

LENGTH = 16


def windows_of(place: Path | None, length: int = LENGTH, vocabulary: int = VOCABULARY) -> Windows:
    return read_windows(place, byte_tokenizer, length, vocabulary)


def tokens_of(*texts: str) -> list[int]:
    """Return what the windows hold of some texts, one after another, whole windows only."""
    ids = [token for text in texts for token in [*byte_tokenizer()(text, verbose=False)["input_ids"], END]]
    return ids[: len(ids) // LENGTH * LENGTH]


def refused(place: Path | None, **options: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        windows_of(place, **options)
    assert caught.value.remedy
    if place is not None:
        assert str(caught.value.file).startswith(str(place))
    return caught.value


def no_tokenizer() -> Any:
    raise AssertionError("tokens need no tokenizer")


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def write(**tensors: torch.Tensor) -> Path:
        file = tmp_path / "tokens.safetensors"
        save_file(tensors, file)
        return file

    return write


def framing_tokenizer(single: str, **special: str) -> Any:
    """Return a tokenizer that puts special tokens around every text, as Llama's and BERT's do."""
    added = ["<s>", "[CLS]", "[SEP]", "</s>"]
    tok = deepcopy(byte_tokenizer())
    tok.add_special_tokens({**special, "additional_special_tokens": added})
    tok.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[(token, tok.convert_tokens_to_ids(token)) for token in added]
    )
    return tok


# Text -----------------------------------------------------------------------------------------------------------------


def test_text_is_cut_into_windows_and_labels_are_the_next_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The quick brown fox jumps over the lazy dog, twice.")
    found = windows_of(tmp_path / "a.txt")
    assert found.ids.flatten().tolist() == tokens_of((tmp_path / "a.txt").read_text())
    assert found.ids.shape == (3, LENGTH)
    assert found.ids.dtype == found.labels.dtype == torch.int64
    assert torch.equal(found.labels[:, :-1], found.ids[:, 1:])
    assert (found.labels[:, -1] == -100).all()
    assert found.attention_mask is None
    assert set(found.inputs) == {"input_ids"}
    assert (found.name, found.tokens, len(found)) == ("a.txt", 48, 3)


@pytest.mark.parametrize(
    ("single", "special", "before", "after"),
    [
        ("<s> $A", {"bos_token": "<s>"}, ["<s>"], []),
        ("[CLS] $A [SEP]", {"cls_token": "[CLS]", "sep_token": "[SEP]"}, ["[CLS]"], ["[SEP]"]),
        ("$A </s>", {"eos_token": "</s>"}, [], []),  # ends a text, and a window is in the middle of one
    ],
    ids=["bos", "encoder", "eos"],
)
def test_every_window_begins_and_ends_as_the_model_expects(
    tmp_path: Path, single: str, special: dict[str, str], before: list[str], after: list[str]
) -> None:
    (tmp_path / "a.txt").write_text("The quick brown fox jumps over the lazy dog, twice.")
    tok = framing_tokenizer(single, **special)
    found = read_windows(tmp_path / "a.txt", lambda: tok, LENGTH, len(tok))
    first, last = (tok.convert_tokens_to_ids(part) for part in (before, after))
    inner = LENGTH - len(first) - len(last)
    for row in found.ids.tolist():
        assert row[: len(first)] == first
        assert row[LENGTH - len(last) :] == last
    text = found.ids[:, len(first) : LENGTH - len(last)].flatten().tolist()
    expected = byte_tokenizer()((tmp_path / "a.txt").read_text(), verbose=False)["input_ids"]
    assert text[: len(expected)] == expected[: len(text)]
    assert len(found) == (len(expected) + (0 if last else 1)) // inner


def test_every_text_of_jsonl_ends_with_the_end_token(tmp_path: Path) -> None:
    lines = [{"text": "first text of some length"}, {"text": "zweiter Text: größer"}, {"text": "x\u2028y\u0085z\x0c"}]
    file = tmp_path / "a.jsonl"
    file.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n", encoding="utf-8")
    assert windows_of(file).ids.flatten().tolist() == tokens_of(*(line["text"] for line in lines))


def test_messages_are_joined(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Three, I believe."}]
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": talk}))
    assert windows_of(file).ids.flatten().tolist() == tokens_of("How many?\nThree, I believe.")


def test_a_folder_gives_its_texts_in_the_order_of_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_text("second file, with some words")
    (folder / "a.jsonl").write_text(json.dumps({"text": "first file, a line of JSONL"}))
    (folder / "sub" / "c.md").write_text("third file, one folder down")
    (folder / "notes.txt").write_bytes(b"\xff\xfe not UTF-8")
    (folder / "picture.png").write_text("no text by its name")
    expected = tokens_of("first file, a line of JSONL", "second file, with some words", "third file, one folder down")
    found = windows_of(folder)
    assert found.ids.flatten().tolist() == expected
    assert found.name == "texts"


def test_without_a_file_there_is_a_built_in_mix() -> None:
    found = windows_of(None, length=256)
    assert found.name == BUILT_IN
    assert len(found) > 1000
    assert bool((found.ids == END).any())


def test_long_texts_bring_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer says that the model takes 64 tokens; windows are cut afterwards."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    (tmp_path / "a.txt").write_text("word " * 100)
    read_windows(tmp_path / "a.txt", byte_tokenizer.__wrapped__, LENGTH, VOCABULARY)  # a new one: it warns once only
    assert not caplog.records


def test_the_digest_is_that_of_the_tokens(tmp_path: Path) -> None:
    for name, text in (("a.txt", "the same text in both files"), ("b.md", "the same text in both files")):
        (tmp_path / name).write_text(text)
    (tmp_path / "c.txt").write_text("The same text in both files")
    first, same, other = (windows_of(tmp_path / name).sha256 for name in ("a.txt", "b.md", "c.txt"))
    assert first == same == windows_of(tmp_path / "a.txt").sha256
    assert first != other
    assert len(first) == 64


def test_windows_are_shortened_with_their_labels(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The quick brown fox jumps over the lazy dog, twice.")
    whole = windows_of(tmp_path / "a.txt")
    short = whole.shortened(5)
    assert torch.equal(short.ids, whole.ids[:, :5])
    assert torch.equal(short.labels[:, :4], whole.ids[:, 1:5])
    assert (short.labels[:, -1] == -100).all()
    assert (whole.labels[:, 4] != -100).all()  # the original is as it was
    assert torch.equal(whole.shortened(100).labels, whole.labels)


def test_some_windows_are_selected() -> None:
    ids = torch.arange(12).view(3, 4)
    whole = Windows(ids, ids + 1, torch.ones_like(ids), "some", "digest")
    for places in (torch.tensor([2, 0]), [2, 0]):
        found = whole.select(places)
        assert torch.equal(found.ids, ids[[2, 0]])
        assert torch.equal(found.labels, ids[[2, 0]] + 1)
        assert found.attention_mask is not None
        assert found.attention_mask.shape == (2, 4)


# Tokens ---------------------------------------------------------------------------------------------------------------


def test_tokens_need_no_tokenizer(save: Callable[..., Path]) -> None:
    ids = torch.arange(40).view(2, 20)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        found = read_windows(save(input_ids=ids.to(dtype)), no_tokenizer, 20, 100)
        assert torch.equal(found.ids, ids)
        assert torch.equal(found.labels[:, :-1], ids[:, 1:])
        assert (found.labels[:, -1] == -100).all()


def test_wide_windows_of_tokens_are_cut_and_narrow_ones_kept(save: Callable[..., Path]) -> None:
    file = save(input_ids=torch.arange(40).view(2, 20))
    assert windows_of(file, length=16).ids.shape == (2, 16)
    assert (windows_of(file, length=16).labels[:, -1] == -100).all()
    assert windows_of(file, length=512).ids.shape == (2, 20)


def test_padding_is_not_predicted_and_predicts_nothing(save: Callable[..., Path]) -> None:
    ids = torch.arange(1, 13).view(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]])
    found = windows_of(save(input_ids=ids, attention_mask=mask))
    assert found.labels.tolist() == [[2, 3, 4, -100, -100, -100], [-100, -100, 10, 11, 12, -100]]
    assert found.attention_mask is not None
    assert torch.equal(found.inputs["attention_mask"], mask)
    assert found.tokens == 8
    assert found.shortened(4).tokens == 6
    assert found.select([0]).inputs["attention_mask"].tolist() == mask[:1].tolist()


def test_padding_may_hold_anything(save: Callable[..., Path]) -> None:
    ids = torch.tensor([[5, 6, 7, 99_999]])
    file = save(input_ids=ids, attention_mask=torch.tensor([[1, 1, 1, 0]], dtype=torch.bool))
    assert windows_of(file).labels.tolist() == [[6, 7, -100, -100]]


def test_labels_are_taken_as_trainer_takes_them(save: Callable[..., Path]) -> None:
    """A label stands at its own token's place; Trainer shifts them, and so do the windows."""
    ids = torch.arange(1, 7)[None]
    labels = torch.tensor([[-100, -100, 3, 4, -100, 6]])
    found = windows_of(save(input_ids=ids, labels=labels))
    assert found.labels.tolist() == [[-100, 3, 4, -100, 6, -100]]
    masked = windows_of(save(input_ids=ids, labels=labels, attention_mask=torch.tensor([[1, 1, 1, 1, 1, 0]])))
    assert masked.labels.tolist() == [[-100, 3, 4, -100, -100, -100]]


# Refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nosuch.txt", "nosuch.jsonl", "nosuch.safetensors"])
def test_a_missing_file(tmp_path: Path, name: str) -> None:
    assert "no such calibration file" in refused(tmp_path / name).what


@pytest.mark.parametrize("text", ["", "  \n\t\n"])
def test_no_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    assert "no text" in refused(tmp_path / "a.txt").what


def test_an_empty_folder(tmp_path: Path) -> None:
    assert "no text" in refused(tmp_path).what


def test_less_than_one_window(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short")
    assert "has 6 tokens, fewer than one window of 16" in refused(tmp_path / "a.txt").what


def test_text_that_is_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("größer".encode("latin-1") * 10)
    assert "not readable as UTF-8" in refused(tmp_path / "a.txt").what


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1, 2]",
        '"text"',
        "7",
        '{"body": "x"}',
        '{"text": 7}',
        '{"text": null}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": ["text"]}',
        '{"messages": [{"content": ["parts"]}]}',
        "[" * 100_000,
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "a good line"}) + "\n\n" + line + "\n")
    error = refused(file)
    assert error.what.startswith("line 3: neither a `text` nor `messages`")
    assert error.file == str(file)


def test_a_bad_line_in_a_folder_is_named_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a good line"}\nbad\n')
    error = refused(tmp_path)
    assert error.what.startswith("line 2:")
    assert error.file == str(tmp_path / "a.jsonl")


def test_text_of_another_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text long enough for a window")
    assert (
        f"token id {END} is outside the model's vocabulary of 200" in refused(tmp_path / "a.txt", vocabulary=200).what
    )


@pytest.mark.parametrize("token", [VOCABULARY, -1])
def test_tokens_of_another_vocabulary(save: Callable[..., Path], token: int) -> None:
    ids = torch.arange(40).view(2, 20)
    ids[1, 7] = token
    assert f"outside the model's vocabulary of {VOCABULARY}" in refused(save(input_ids=ids)).what


@pytest.mark.parametrize(
    "ids", [torch.arange(20), torch.ones(2, 20), torch.ones(2, 2, 20).long(), torch.empty(0, 20).long()]
)
def test_tokens_of_no_use(save: Callable[..., Path], ids: torch.Tensor) -> None:
    assert "no `input_ids` of shape [windows, tokens]" in refused(save(input_ids=ids)).what


def test_tokens_under_another_name(save: Callable[..., Path]) -> None:
    assert "no `input_ids`" in refused(save(tokens=torch.arange(40).view(2, 20))).what


@pytest.mark.parametrize("name", ["attention_mask", "labels"])
def test_tensors_of_another_shape(save: Callable[..., Path], name: str) -> None:
    ids = torch.arange(40).view(2, 20)
    error = refused(save(input_ids=ids, **{name: ids[:, :19].clone()}))
    assert (error.what, error.tensor) == ("[2, 19] is not the shape of input_ids, [2, 20]", name)


def test_tokens_none_of_which_count(save: Callable[..., Path]) -> None:
    ids = torch.arange(40).view(2, 20)
    assert "no token" in refused(save(input_ids=ids, labels=torch.full_like(ids, -100))).what
    assert "no token" in refused(save(input_ids=ids, attention_mask=torch.zeros_like(ids))).what
    assert "no token" in refused(save(input_ids=ids[:, :1].clone())).what


def test_a_damaged_file_of_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"no header")
    assert "not a safetensors file" in refused(tmp_path / "a.safetensors").what


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text long enough for a window")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="no tokenizer that loads") as caught:
        read_windows(tmp_path / "a.txt", lambda: load_tokenizer(tmp_path / "m"), LENGTH, VOCABULARY)
    assert caught.value.file == str(tmp_path / "m")
    assert "--calibration tokens.safetensors" in str(caught.value.remedy)
