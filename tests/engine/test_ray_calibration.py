"""Running a model over calibration text on a Ray cluster: the bytes of the local engine, whatever the workers do."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import basiscli
from basiscli.engine.local import Silent
from basiscli.errors import InputError
from tests.init_models import bert, llama, save, shards_of
from tests.kv_models import make_model, make_text, save_model
from tests.plugins.test_data_inits import opt, write_tokens

pytest.importorskip("ray")
pytestmark = pytest.mark.usefixtures("cluster")
MODELS = {"llama": llama, "opt": opt, "bert": bert}


def tokens(tmp_path: Path, count: int = 80) -> Path:
    """Return windows that make five batches, of which some tokens do not count."""
    return write_tokens(tmp_path / "tokens.safetensors", count=count, length=64, padded=True, answers=True)


def make(model: Path, out: Path, method: str, **options: Any) -> basiscli.InitResult:
    text = model.parent / "tokens.safetensors"
    given: dict[str, Any] = {"calibration": text, "rank": 4, "tokens": 1 << 20, "length": 64}
    return basiscli.init(model, method=method, output=out, **given | options)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["eva", "corda"])
def test_adapters_from_data_come_out_as_they_do_here(tmp_path: Path, method: str, name: str) -> None:
    """OPT has targets before and behind its layers, and BERT a pooler, of which a row is a window."""
    tokens(tmp_path)
    model = save(MODELS[name], tmp_path / "model")
    here = make(model, tmp_path / "here", method, workers=3)
    for workers in (1, 2):
        there = make(model, tmp_path / f"there{workers}", method, engine="ray", workers=workers)
        assert shards_of(there.path) == shards_of(here.path)
        assert there.report.weights_digest == here.report.weights_digest
        assert there.report.numbers == here.report.numbers
        assert there.report.adapter == here.report.adapter
        assert not (there.path / "scratch").exists()
        assert not (tmp_path / f"there{workers}.partial").exists()


def workers_of_this_process() -> Iterator[int]:
    """Yield the processes of Ray's workers that descend from this one, whatever else runs on the machine."""
    parents: dict[int, int] = {}
    workers = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            title = (folder / "cmdline").read_bytes()
            if title.startswith(b"ray::") and b"Agent" not in title:  # without its agents a node gives up
                workers.add(int(folder.name))
        except OSError:
            continue  # it has ended meanwhile
    for worker in workers:
        above = worker
        while above in parents and above != os.getpid():
            above = parents[above]
        if above == os.getpid():
            yield worker


class Kills(Silent):
    """Kills all workers when so many batches have passed a layer."""

    def __init__(self, *moments: int) -> None:
        self.moments, self.passed, self.killed, self.notes = moments, 0, 0, list[str]()

    def advance(self, size: int) -> None:
        self.passed += 1
        if self.passed in self.moments:
            for worker in workers_of_this_process():
                os.kill(worker, signal.SIGKILL)
                self.killed += 1

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize(("method", "moments"), [("eva", (1, 14)), ("corda", (10,))])
def test_what_killed_workers_had_is_done_again(tmp_path: Path, method: str, moments: tuple[int, ...]) -> None:
    """Within a layer, the first and the second, and where the first ends."""
    tokens(tmp_path, count=160)
    model = save(llama, tmp_path / "model")
    here = make(model, tmp_path / "here", method)
    kills = Kills(*moments)
    there = make(model, tmp_path / "there", method, engine="ray", progress=kills)
    assert kills.killed
    if method == "eva":  # there tasks were waiting for them
        assert any(note.startswith("workers lost: ") for note in kills.notes)
        assert any(note.startswith("a worker was lost at ") for note in there.report.notes)
    assert shards_of(there.path) == shards_of(here.path)
    assert there.report.numbers == here.report.numbers


class Interrupted(Silent):
    """Ctrl-C when so many batches have passed a layer."""

    def __init__(self, left: int) -> None:
        self.left = left

    def advance(self, size: int) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_here_and_there(tmp_path: Path) -> None:
    """CorDA's weights of the first layer are done; what they were made from is made again."""
    tokens(tmp_path)
    model = save(llama, tmp_path / "model")
    whole = make(model, tmp_path / "whole", "corda")
    for engine in ("local", "ray"):
        out = tmp_path / engine
        with pytest.raises(KeyboardInterrupt):
            make(model, out, "corda", engine="ray", progress=Interrupted(7))
        result = make(model, out, "corda", engine=engine)
        assert result.report.cost.resumed_steps == 7
        assert shards_of(result.path) == shards_of(whole.path)


def test_a_model_with_nan_is_refused_as_it_is_here(tmp_path: Path) -> None:
    tokens(tmp_path)
    model = save(llama, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    for engine in ("local", "ray"):
        with pytest.raises(InputError, match="layer 1 gives NaN or Inf") as raised:
            make(model, tmp_path / "out", "eva", engine=engine)
        assert raised.value.remedy
        assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(("text", "steps"), [("text", 0), ("tokens", 3)])
def test_a_compressed_cache_comes_out_as_it_does_here(tmp_path: Path, text: str, steps: int) -> None:
    model = save_model(tmp_path / "m", make_model())
    (tmp_path / "text.txt").write_text(make_text(2000))
    calibration = tokens(tmp_path, count=20) if text == "tokens" else tmp_path / "text.txt"
    options: dict[str, Any] = {
        "kv_ratio": 0.5, "calibration": calibration, "length": 32, "train_steps": steps, "fold_values": True,
    }  # fmt: skip
    here = basiscli.compress(model, output=tmp_path / "here", **options)
    for workers in (1, 2):
        out, kills = tmp_path / f"there{workers}", Kills(2) if workers == 2 else Silent()
        there = basiscli.compress(model, output=out, engine="ray", workers=workers, progress=kills, **options)
        assert shards_of(there.path) == shards_of(here.path)
        assert there.report.numbers == here.report.numbers
        assert there.report.kv == here.report.kv
        assert not (tmp_path / f"there{workers}.partial").exists()
