"""Headers: the same as the safetensors library's, and no lie believed."""

from __future__ import annotations

import json
import re
import struct
import time
import tracemalloc
from pathlib import Path
from random import Random
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from basiscli.checkpoints.dtypes import DTYPES, raw_bytes, tensor_bytes, torch_dtype
from basiscli.checkpoints.header import MAX_HEADER_BYTES, Header, TensorSpec, encode_header, read_header
from basiscli.errors import InputError

IN_TORCH = [word for word, dtype in DTYPES.items() if dtype.torch_name]
NAMES = ["model.layers.0.weight", "with spaces", 'a "quote" and a \\', "größe.权重", "0", "💾"]
MEMORY = 4 << 20  # bytes that reading a small file may take, whatever it claims

# A header of one tensor, to be made a liar by changing one thing.
HONEST = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def every_dtype() -> dict[str, torch.Tensor]:
    """Return tensors of every dtype that torch has and of every kind of shape."""
    tensors = {}
    for number, word in enumerate(IN_TORCH):
        for shape in ([], [0, 3], [5], [2, 3, 4]):
            count = tensor_bytes(word, tuple(shape))
            data = torch.arange(number, number + count, dtype=torch.int64).to(torch.uint8)
            data = data % 2 if word == "BOOL" else data
            tensors[f"{word}.{shape}"] = data.view(torch_dtype(word)).reshape(shape)
    return tensors


def write(file: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """Write a file with any header: JSON text, bytes, or what becomes JSON."""
    raw = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    file.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return file


def stored_bytes(file: Path, header: Header, name: str) -> bytes:
    tensor = header.tensors[name]
    return file.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]


def refusal(file: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        read_header(file)
    assert caught.value.file == str(file)
    return caught.value


# The same as the safetensors library ----------------------------------------------------------------------------------


def test_a_file_of_the_library_is_read_the_same(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    tensors = every_dtype()
    metadata = {"format": "pt", "größe": 'a "quote"\n'}
    save_file(tensors, file, metadata)
    header = read_header(file)
    assert header.metadata == metadata
    assert header.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch_dtype(header.tensors[name].dtype) == tensor.dtype
        assert header.tensors[name].shape == tuple(tensor.shape)
        assert header.tensors[name].count == tensor.numel()
        assert stored_bytes(file, header, name) == bytes(raw_bytes(tensor))


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_file_of_the_library_with_any_name_is_read_the_same(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    file = tmp_path / "model.safetensors"
    save_file({name: torch.full((3,), float(n)) for n, name in enumerate(NAMES)}, file, metadata)
    header = read_header(file)
    assert header.metadata == (metadata or {})
    assert {name: struct.unpack("<3f", stored_bytes(file, header, name))[0] for name in NAMES} == {
        name: float(n) for n, name in enumerate(NAMES)
    }


def test_a_file_of_the_library_without_tensors_is_read(tmp_path: Path) -> None:
    save_file({}, tmp_path / "model.safetensors")
    assert read_header(tmp_path / "model.safetensors") == Header({}, {})


def test_tensors_come_in_the_order_of_the_header(tmp_path: Path) -> None:
    entries = {
        "b": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]},
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
    }
    assert list(read_header(write(tmp_path / "m.safetensors", entries, b"123")).tensors) == ["b", "a"]


@pytest.mark.parametrize("metadata", [{}, {"format": "pt", "größe": 'a "quote"\n'}])
def test_the_library_loads_what_was_laid_out(tmp_path: Path, metadata: dict[str, str]) -> None:
    file = tmp_path / "model.safetensors"
    tensors = every_dtype() | {name: torch.tensor([n]) for n, name in enumerate(NAMES)}
    words = {torch_dtype(word): word for word in IN_TORCH}
    specs = [TensorSpec(name, words[t.dtype], tuple(t.shape)) for name, t in tensors.items()]
    head, offsets = encode_header(specs, metadata)
    data = b"".join(bytes(raw_bytes(tensor)) for tensor in tensors.values())
    file.write_bytes(head + data)
    assert len(head) % 8 == 0
    with safetensors.safe_open(file, framework="pt") as opened:
        assert (opened.metadata() or {}) == metadata
    loaded = load_file(file)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert bytes(raw_bytes(loaded[name])) == bytes(raw_bytes(tensor))
    header = read_header(file)
    assert header.metadata == metadata
    assert {name: tensor.offset for name, tensor in header.tensors.items()} == offsets


# Lies -----------------------------------------------------------------------------------------------------------------


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "nosuch.safetensors").what


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    assert "cannot read" in refusal(tmp_path).what


@pytest.mark.parametrize("size", [0, 1, 7])
def test_too_short_for_a_length(tmp_path: Path, size: int) -> None:
    file = tmp_path / "m.safetensors"
    file.write_bytes(bytes(size))
    assert f"only {size} bytes" in refusal(file).what


@pytest.mark.parametrize("length", [3, MAX_HEADER_BYTES + 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file(tmp_path: Path, length: int) -> None:
    assert f"claims {length} bytes" in refusal(write(tmp_path / "m.safetensors", "{}", length=length)).what


def test_a_header_longer_than_the_format_allows_is_not_read(tmp_path: Path) -> None:
    file = write(tmp_path / "m.safetensors", "{}", length=MAX_HEADER_BYTES + 1)
    with file.open("r+b") as stream:
        stream.truncate(MAX_HEADER_BYTES + 100)  # sparse: the file has room for what it claims
    tracemalloc.start()
    try:
        assert f"claims {MAX_HEADER_BYTES + 1} bytes" in refusal(file).what
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"a":}', "{}{}", b"\xff\xfe", b'{"\xff": 1}', "\0\0", '{"a": ' + "9" * 5000 + "}"],
    ids=["empty", "cut off", "no value", "two", "not UTF-8", "a name not UTF-8", "zeros", "endless number"],
)
def test_not_json(tmp_path: Path, text: str | bytes) -> None:
    assert "not valid JSON" in refusal(write(tmp_path / "m.safetensors", text)).what


@pytest.mark.parametrize("text", ["[]", "null", "1", '"text"', "[{}]", "NaN"])
def test_json_that_is_no_object(tmp_path: Path, text: str) -> None:
    assert "not a JSON object" in refusal(write(tmp_path / "m.safetensors", text)).what


@pytest.mark.parametrize("opening", ["[", '{"a":', '{"a":{"dtype":"F32","shape":['])
def test_deep_nesting(tmp_path: Path, opening: str) -> None:
    assert "not valid JSON" in refusal(write(tmp_path / "m.safetensors", opening * 100_000)).what


def test_one_name_twice(tmp_path: Path) -> None:
    entry = json.dumps(HONEST)
    error = refusal(write(tmp_path / "m.safetensors", f'{{"w": {entry}, "w": {entry}}}', bytes(24)))
    assert "appears twice" in error.what
    assert re.search(r"\bw\b", str(error))  # which of thousands it is


def test_one_name_of_many_twice_is_found_at_once(tmp_path: Path) -> None:
    names = ", ".join(f'"w{n}": 0' for n in range(30_000))
    file = write(tmp_path / "m.safetensors", f'{{{names}, "last": 0, "last": 0}}')
    start = time.process_time()
    assert "last" in str(refusal(file))
    assert time.process_time() - start < 2


def test_one_field_twice(tmp_path: Path) -> None:
    text = '{"w": {"dtype": "F32", "dtype": "F64", "shape": [2, 3], "data_offsets": [0, 24]}}'
    assert "appears twice" in refusal(write(tmp_path / "m.safetensors", text, bytes(24))).what


@pytest.mark.parametrize("entry", [None, 1, "text", [], [0, 24], True])
def test_an_entry_that_is_no_object(tmp_path: Path, entry: object) -> None:
    error = refusal(write(tmp_path / "m.safetensors", {"w": entry}, bytes(24)))
    assert "not an object" in error.what
    assert error.tensor == "w"


@pytest.mark.parametrize(
    ("field", "value", "cause"),
    [
        *(("dtype", value, "unknown dtype") for value in ["F33", "f32", "", None, 1, ["F32"], {}]),
        pytest.param("dtype", "F" * 10**6, "unknown dtype", id="a dtype without end"),
        *(("shape", value, "list of sizes") for value in [None, 6, "6", {}, [2, "3"], [2, None], [[2], 3]]),
        ("shape", [-2, -3], "list of sizes"),
        ("shape", [True, 6], "list of sizes"),
        ("shape", [2.0, 3], "list of sizes"),
        ("shape", [2**63], "list of sizes"),
        ("shape", [10**4000], "list of sizes"),
        ("shape", [1] * 65, "list of sizes"),
        ("shape", [2, 4], "need 32 bytes, data_offsets give 24"),
        ("shape", [2**62, 2**62, 2**62], "data_offsets give 24"),
        ("shape", [2**62, 2], "data_offsets give 24"),  # 2⁶⁴ · 2 bytes: zero to a machine that forgets the carry
        ("dtype", "F64", "need 48 bytes, data_offsets give 24"),
        ("data_offsets", None, "a begin and an end"),
        ("data_offsets", [24], "a begin and an end"),
        ("data_offsets", [0, 24, 48], "a begin and an end"),
        ("data_offsets", [24, 0], "a begin and an end"),
        ("data_offsets", [-24, 0], "a begin and an end"),
        ("data_offsets", [0.0, 24.0], "a begin and an end"),
        ("data_offsets", [False, 24], "a begin and an end"),
        ("data_offsets", [0, 2**64], "a begin and an end"),
        ("data_offsets", [0, 20], "need 24 bytes, data_offsets give 20"),
        ("data_offsets", [4, 28], "ends at byte"),
        ("data_offsets", [2**62, 2**62 + 24], "ends at byte"),
    ],
)
def test_an_entry_that_lies(tmp_path: Path, field: str, value: object, cause: str) -> None:
    error = refusal(write(tmp_path / "m.safetensors", {"w": HONEST | {field: value}}, bytes(24)))
    assert cause in error.what
    assert error.tensor == "w"
    assert len(str(error)) < 1000
    assert error.remedy


@pytest.mark.parametrize("field", ["dtype", "shape", "data_offsets"])
def test_an_entry_that_lacks_a_field(tmp_path: Path, field: str) -> None:
    entry = {key: value for key, value in HONEST.items() if key != field}
    assert refusal(write(tmp_path / "m.safetensors", {"w": entry}, bytes(24))).tensor == "w"


@pytest.mark.parametrize(
    ("first", "second", "size", "cause"),
    [
        ([0, 24], [0, 24], 24, "overlaps"),
        ([0, 24], [20, 44], 44, "overlaps"),
        ([0, 24], [28, 52], 52, "leaves a hole"),
        ([0, 24], [24, 48], 47, "truncated"),
        ([0, 24], [2**40, 2**40 + 24], 48, "truncated"),
    ],
)
def test_two_tensors_that_do_not_fit(
    tmp_path: Path, first: list[int], second: list[int], size: int, cause: str
) -> None:
    entries = {"v": HONEST | {"data_offsets": first}, "w": HONEST | {"data_offsets": second}}
    error = refusal(write(tmp_path / "m.safetensors", entries, bytes(size)))
    assert cause in error.what
    assert error.tensor == "w"
    assert error.remedy


def test_an_empty_tensor_inside_another(tmp_path: Path) -> None:
    entries = {"v": HONEST, "w": {"dtype": "F32", "shape": [0], "data_offsets": [8, 8]}}
    assert refusal(write(tmp_path / "m.safetensors", entries, bytes(24))).tensor == "w"


def test_a_hole_at_the_start(tmp_path: Path) -> None:
    entries = {"w": HONEST | {"data_offsets": [8, 32]}}
    assert "leaves a hole" in refusal(write(tmp_path / "m.safetensors", entries, bytes(32))).what


@pytest.mark.parametrize("entries", [{"w": HONEST}, {}])
def test_bytes_after_the_last_tensor(tmp_path: Path, entries: dict[str, object]) -> None:
    assert "the tensors end at" in refusal(write(tmp_path / "m.safetensors", entries, bytes(25))).what


def test_elements_that_end_within_a_byte(tmp_path: Path) -> None:
    entries = {"w": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}}
    file = write(tmp_path / "m.safetensors", entries, bytes(2))
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(file.read_bytes())
    assert refusal(file).tensor == "w"


@pytest.mark.parametrize("metadata", [None, 1, "text", [], {"a": 1}, {"a": None}, {"a": {"b": "c"}}, {"a": ["b"]}])
def test_metadata_that_is_no_table_of_strings(tmp_path: Path, metadata: object) -> None:
    file = write(tmp_path / "m.safetensors", {"__metadata__": metadata, "w": HONEST}, bytes(24))
    assert "metadata" in refusal(file).what


@pytest.mark.parametrize("name", ["", "a\nb", "a\0b", "\x1b[2J", "\u202e", "a\u2028b", "\x7f", "\ud800", "w\udfff"])
def test_a_name_that_cannot_be_shown(tmp_path: Path, name: str) -> None:
    error = refusal(write(tmp_path / "m.safetensors", {name: HONEST}, bytes(24)))
    assert "empty or has unprintable characters" in error.what
    assert (error.tensor or "").isprintable()
    str(error).encode()


@pytest.mark.parametrize("metadata", [{"a": "\ud800"}, {"\udfff": "a"}])
def test_metadata_that_is_no_unicode(tmp_path: Path, metadata: dict[str, str]) -> None:
    file = write(tmp_path / "m.safetensors", {"__metadata__": metadata, "w": HONEST}, bytes(24))
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(file.read_bytes())
    refusal(file)


# Anything at all ------------------------------------------------------------------------------------------------------

fuzz = settings(max_examples=200, deadline=2000, database=None)
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
sizes = st.integers(0, 6) | st.sampled_from([-1, 2**31, 2**62, 2**63, 2**64, True, 2.0, None])
any_entry = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPES, "F33", "", None]),
        "shape": st.lists(sizes, max_size=4),
        "data_offsets": st.lists(st.integers(0, 40) | sizes, min_size=1, max_size=3),
    },
)
any_name = st.sampled_from(["a", "b", "c", "", "\ud800", "__metadata__"]) | st.text(max_size=4)
any_tensors = st.dictionaries(
    st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=4),
    st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 4), max_size=3)),
    max_size=4,
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "model.safetensors"


def read_or_refuse(file: Path) -> Header | None:
    """Check that a header is refused or tiles its file exactly, cheaply in any case."""
    tracemalloc.start()
    try:
        header = read_header(file)
    except InputError as error:
        assert error.file == str(file)
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MEMORY
    raw = file.read_bytes()
    position = 8 + struct.unpack("<Q", raw[:8])[0]
    for tensor in sorted(header.tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        assert tensor.offset == position
        assert tensor.nbytes == tensor_bytes(tensor.dtype, tensor.shape)
        position += tensor.nbytes
    assert position == len(raw)
    return header


def well_formed(tensors: dict[str, tuple[str, list[int]]]) -> bytes:
    specs = [TensorSpec(name, word, tuple(shape)) for name, (word, shape) in tensors.items()]
    return encode_header(specs, {"format": "pt"})[0] + bytes(sum(spec.nbytes for spec in specs))


@fuzz
@given(raw=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(file: Path, raw: bytes) -> None:
    file.write_bytes(raw)
    read_or_refuse(file)


@fuzz
@given(header=st.binary(max_size=100) | st.text(alphabet='{}[]":,0123456789 aFU_', max_size=100), data=st.binary())
def test_any_header_text_is_read_or_refused(file: Path, header: str | bytes, data: bytes) -> None:
    read_or_refuse(write(file, header, data))


@fuzz
@given(
    tensors=any_tensors,
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=3),
    cut=st.integers(-20, 20),
)
def test_a_damaged_file_is_read_or_refused(
    file: Path, tensors: dict[str, tuple[str, list[int]]], changes: list[tuple[int, int]], cut: int
) -> None:
    raw = bytearray(well_formed(tensors))
    for place, value in changes:
        raw[place % len(raw)] = value
    file.write_bytes(raw[: len(raw) + cut] if cut < 0 else raw + bytes(cut))
    read_or_refuse(file)


@fuzz
@given(length=st.integers(0, 2**64 - 1) | st.integers(0, 300), tensors=any_tensors)
def test_a_false_header_length_is_read_or_refused(
    file: Path, length: int, tensors: dict[str, tuple[str, list[int]]]
) -> None:
    file.write_bytes(struct.pack("<Q", length) + well_formed(tensors)[8:])
    read_or_refuse(file)


@fuzz
@given(header=st.dictionaries(any_name, any_entry | any_json, max_size=4) | any_json, data=st.binary(max_size=48))
def test_any_json_is_read_or_refused(file: Path, header: Any, data: bytes) -> None:
    read_or_refuse(write(file, json.dumps(header), data))


@fuzz
@given(tensors=any_tensors, order=st.randoms(), lie=st.none() | any_entry, cut=st.sampled_from([0, 0, 0, -1, 1]))
def test_what_the_library_reads_is_read_and_nothing_else(
    file: Path, tensors: dict[str, tuple[str, list[int]]], order: Random, lie: dict[str, Any] | None, cut: int
) -> None:
    raw = well_formed(tensors)
    (length,) = struct.unpack("<Q", raw[:8])
    entries = list(json.loads(raw[8 : 8 + length]).items())
    order.shuffle(entries)
    if lie:
        name, entry = entries.pop()
        entries.append((name, {**entry, **lie}))
    data = raw[8 + length :]
    write(file, dict(entries), data[:cut] if cut < 0 else data + bytes(cut))
    try:
        known = dict(safetensors.deserialize(file.read_bytes()))
    except safetensors.SafetensorError:
        known = None
    header = read_or_refuse(file)
    assert (header is None) == (known is None)
    if header is not None and known is not None:
        assert {n: (t.dtype, t.shape) for n, t in header.tensors.items()} == {
            n: (entry["dtype"], tuple(entry["shape"])) for n, entry in known.items()
        }
