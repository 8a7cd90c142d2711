"""Writing past the page cache: the same file as any other way of writing."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from basiscli.checkpoints import direct
from basiscli.checkpoints.direct import DirectFile

PAGE = 4096


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "file"
    path.write_bytes(bytes(40 * PAGE))
    yield path


def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_BUFFER_BYTES", 2 * PAGE)
    monkeypatch.setattr(direct, "_own", threading.local())  # this thread may have one already


def rest(path: Path, data: bytes, offset: int, done: tuple[int, int]) -> None:
    """Write what was not written directly, as the writer of shards does."""
    with path.open("r+b") as stream:
        for begin, end in ((0, done[0]), (done[1], len(data))):
            stream.seek(offset + begin)
            stream.write(data[begin:end])


def test_pieces_of_any_size_at_any_place_lie_where_they_belong(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_buffer(monkeypatch)
    chance = random.Random(0)
    expected, written = bytearray(file.read_bytes()), DirectFile(file)
    able = written.descriptor is not None
    by_page = 0
    for _ in range(200):
        offset = chance.randrange(30 * PAGE)
        data = chance.randbytes(chance.randrange(10 * PAGE))
        done = written.write(memoryview(data), offset)
        if done != (0, 0):
            assert (offset + done[0]) % PAGE == 0 and (offset + done[1]) % PAGE == 0
            assert done[0] < PAGE and len(data) - done[1] < PAGE
            by_page += 1
        rest(file, data, offset, done)
        expected[offset : offset + len(data)] = data
        assert file.read_bytes() == expected
    written.close()
    assert (by_page > 100) == able


def test_a_system_without_direct_writes_writes_nothing_here(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    written = DirectFile(file)
    assert written.write(memoryview(bytes([1]) * 9 * PAGE), 0) == (0, 0)
    assert file.read_bytes() == bytes(40 * PAGE)


@pytest.mark.parametrize("after", [0, 1])
def test_a_disk_that_refuses_them_gets_the_rest_otherwise(
    file: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    small_buffer(monkeypatch)
    real, calls = os.pwrite, list[int]()

    def refuse(*words: object) -> int:
        calls.append(1)
        if len(calls) > after:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(*words)  # type: ignore[arg-type]

    written = DirectFile(file)
    if written.descriptor is None:
        pytest.skip("no direct writes on this file system")
    monkeypatch.setattr(os, "pwrite", refuse)
    data = os.urandom(9 * PAGE)
    done = written.write(memoryview(data), 0)
    monkeypatch.undo()
    assert done == (0, 2 * PAGE * after)
    rest(file, data, 0, done)
    assert file.read_bytes()[: 9 * PAGE] == data
    assert written.write(memoryview(data), 0) == (0, 0), "it was tried again"


def test_a_full_disk_is_an_error(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*words: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    written = DirectFile(file)
    if written.descriptor is None:
        pytest.skip("no direct writes on this file system")
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        written.write(memoryview(bytes(PAGE)), 0)
