"""The files of a partial output on a worker."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from basiscli.checkpoints.header import TensorSpec
from basiscli.checkpoints.layout import Layout
from basiscli.checkpoints.shards import JOURNAL, Shards


def test_files_whose_closing_was_interrupted_are_closed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task is cancelled by an interrupt, at any line; the numbers of files that are closed belong to others soon."""
    layout = Layout.plan([TensorSpec(name, "F32", (4,)) for name in "abc"], 20)
    folder = tmp_path / "out.partial"
    folder.mkdir()
    (folder / JOURNAL).write_text(json.dumps({"fingerprint": "f"}) + "\n")
    assert len(layout.shards) == 3
    for shard in layout.shards:
        (folder / shard.file).touch()
    shards = Shards.join(tmp_path / "out", layout, "f")
    closed = []

    def close(descriptor: int) -> None:
        closed.append(descriptor)
        if len(closed) == 2:
            raise KeyboardInterrupt

    descriptors = sorted(shards._descriptors.values())
    with monkeypatch.context() as patch:
        patch.setattr(os, "close", close)
        with pytest.raises(KeyboardInterrupt):
            shards.close()
        shards.close()
    assert sorted(closed) == descriptors
    for descriptor in descriptors:
        os.close(descriptor)
