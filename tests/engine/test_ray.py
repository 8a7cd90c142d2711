"""Tasks on a Ray cluster: the bytes of the local engine, whatever happens to the workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import basiscli
from basiscli.checkpoints.writer import JOURNAL, PartialOutput
from basiscli.engine import batches
from basiscli.engine.local import Task
from basiscli.errors import InputError, ResourceError
from basiscli.registry import Registry
from tests.conftest import add, basis_process, make_tensors, read_checkpoint, write_checkpoint

pytest.importorskip("ray")
from basiscli.engine.ray import Job, RayEngine  # after the line that skips all this without ray

# A method that takes its time, tells who works on what, and may end its own process or fail.
PLUGIN = """
import os, signal, time
from pathlib import Path
from basiscli import transform

@transform("merge", elementwise=True)
def slow(others, *, seconds: float = 0.0, log: str = "", kill: int = 0, fail: bool = False):
    log_file = Path(log)
    with log_file.open("a") as stream:
        stream.write(f"{os.getpid()}\\n")
    if fail and others[0].shape == (40, 24):
        raise ValueError("not this one")
    time.sleep(seconds)
    killed = log_file.with_suffix(".killed")
    if others[0].shape == (40, 24) and len(list(killed.parent.glob("*.killed*"))) < kill:
        killed.with_suffix(f".killed{time.monotonic_ns()}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return sum(others) / len(others)
"""


@pytest.fixture
def slow(tmp_path: Path) -> dict[str, object]:
    """Return the options that name the slow method."""
    file = tmp_path / "slow.py"
    file.write_text(PLUGIN)
    return {"method": "slow", "plugins": [file]}


def weights(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*.safetensors"))}


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("method", Registry().names("merge"))
def test_merges_come_out_as_they_do_here(family: dict[str, Path], tmp_path: Path, method: str) -> None:
    models = [family["a"], family["b"]][: Registry().find("merge", method).models[1]]
    options: dict[str, Any] = {"method": method, "base": family["base"]}
    options |= {"parameters": {"t": 0.3}} if method in {"slerp", "nearswap"} else {}
    here = basiscli.merge(models, output=tmp_path / "here", **options)
    there = basiscli.merge(models, output=tmp_path / "there", engine="ray", shard_size="5GB", **options)
    assert weights(there.path) == weights(here.path)
    assert there.report.weights_digest == here.report.weights_digest
    assert there.report.numbers == here.report.numbers
    assert not (tmp_path / "there.partial").exists()


@pytest.mark.usefixtures("cluster")
def test_a_recipe_comes_out_as_it_does_here(family: dict[str, Path], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    models = [{"model": str(family[name]), "parameters": {"weight": [0.2, 0.7]}} for name in "ab"]
    recipe.write_text(json.dumps({"merge_method": "linear", "models": models}))
    results = [basiscli.run(recipe, output=tmp_path / engine, engine=engine) for engine in ("local", "ray")]
    assert weights(results[1].path) == weights(results[0].path)


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("command", ["pissa", "milora", "olora", "svfit", "nola", "extract", "extract by energy"])
def test_adapters_come_out_as_they_do_here(family: dict[str, Path], tmp_path: Path, command: str) -> None:
    def make(out: Path, **options: object) -> Path:
        if "extract" not in command:
            return basiscli.init(family["a"], method=command, rank=4, output=out, **options).path
        size = {"energy": 0.9} if "energy" in command else {"rank": 4}
        return basiscli.extract(family["a"], base=family["base"], output=out, **size, **options).path

    assert weights(make(tmp_path / "there", engine="ray")) == weights(make(tmp_path / "here"))


@pytest.mark.usefixtures("cluster")
def test_batches_are_tasks_of_their_own(
    family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for GPUs: what the driver puts together, one worker does."""
    monkeypatch.setattr(batches, "_BATCHING", frozenset({"cpu"}))
    sent: list[list[str]] = []
    submit = RayEngine._submit

    def noting(self: RayEngine, job: Job, method: str, task: Task) -> Any:
        sent.append([member.key.rpartition("mlp.")[2] for member in task.members])
        return submit(self, job, method, task)

    monkeypatch.setattr(RayEngine, "_submit", noting)
    models, options = [family["a"], family["b"]], {"method": "ortho", "base": family["base"]}
    here = basiscli.merge(models, output=tmp_path / "here", **options)
    there = basiscli.merge(models, output=tmp_path / "there", engine="ray", **options)
    assert ["down_proj.weight", "up_proj.weight"] in sent
    torch.testing.assert_close(read_checkpoint(there.path), read_checkpoint(here.path))
    assert [t.name for t in there.report.tensors] == [t.name for t in here.report.tensors]


@pytest.mark.usefixtures("cluster")
def test_a_killed_workers_task_is_given_to_another(
    family: dict[str, Path], tmp_path: Path, slow: dict[str, object]
) -> None:
    models = [family["a"], family["b"]]
    log = tmp_path / "log"
    whole = basiscli.merge(models, output=tmp_path / "here", parameters={"log": str(tmp_path / "other")}, **slow)
    parameters = {"kill": 1, "log": str(log), "seconds": 0.01}
    result = basiscli.merge(models, output=tmp_path / "there", engine="ray", parameters=parameters, **slow)
    assert len(list(tmp_path.glob("*.killed*"))) == 1
    assert len(set(log.read_text().split())) > 1
    assert weights(result.path) == weights(whole.path)
    assert "a worker was lost at merge:model.layers.0.mlp.up_proj.weight, and another did it" in result.report.notes


@pytest.mark.usefixtures("cluster")
def test_a_worker_killed_from_outside_between_any_two_tasks(
    family: dict[str, Path], tmp_path: Path, slow: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    log, killed = tmp_path / "log", list[int]()
    record = PartialOutput.record

    def kill(self: PartialOutput, key: str, entry: dict[str, object]) -> None:
        record(self, key, entry)
        if len(self.finished) == 3:
            killed.append(int(log.read_text().split()[-1]))
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(PartialOutput, "record", kill)
    models, parameters = [family["a"], family["b"]], {"log": str(log), "seconds": 0.05}
    result = basiscli.merge(models, output=tmp_path / "there", engine="ray", parameters=parameters, **slow)
    monkeypatch.undo()
    assert killed
    here = basiscli.merge(models, output=tmp_path / "here", parameters={"log": str(log)}, **slow)
    assert weights(result.path) == weights(here.path)
    assert basiscli.verify(result.path).checked_digests


@pytest.mark.usefixtures("cluster")
def test_a_task_that_kills_every_worker_is_given_up(
    family: dict[str, Path], tmp_path: Path, slow: dict[str, object]
) -> None:
    with pytest.raises(ResourceError, match="4 workers were lost") as raised:
        basiscli.merge(
            [family["a"], family["b"]], output=tmp_path / "out", engine="ray",
            parameters={"kill": 100, "log": str(tmp_path / "log")}, **slow,
        )  # fmt: skip
    assert raised.value.tensor == "merge:model.layers.0.mlp.up_proj.weight"
    assert (tmp_path / "out.partial" / JOURNAL).is_file()  # what is finished stays


@pytest.mark.usefixtures("cluster")
def test_an_error_in_a_worker_is_the_error_of_the_run(family: dict[str, Path], tmp_path: Path) -> None:
    tensors = add(make_tensors(0), make_tensors(7))
    tensors["model.norm.weight"][3] = torch.nan
    write_checkpoint(family["c"], tensors)
    with pytest.raises(InputError, match="NaN or Inf") as raised:
        basiscli.merge([family["a"], family["c"]], method="linear", output=tmp_path / "out", engine="ray")
    assert raised.value.tensor == "model.norm.weight"
    assert raised.value.file == str(family["c"] / "model.safetensors")
    assert raised.value.remedy
    assert not list(tmp_path.glob("out*"))  # bad input leaves nothing, and no worker writes on


@pytest.mark.usefixtures("cluster")
def test_a_bug_in_a_method_stops_the_run(family: dict[str, Path], tmp_path: Path, slow: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not this one"):
        basiscli.merge(
            [family["a"], family["b"]], output=tmp_path / "out", engine="ray",
            parameters={"fail": True, "log": str(tmp_path / "log")}, **slow,
        )  # fmt: skip


@pytest.mark.usefixtures("cluster")
def test_a_machine_with_other_files_takes_no_part(
    family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from basiscli.engine.merge_plan import MergePlan

    seen = MergePlan.fingerprint.fget
    monkeypatch.setattr(MergePlan, "fingerprint", property(lambda plan: seen(plan) + "0"))  # type: ignore[misc]
    with pytest.raises(InputError, match="sees other files") as raised:
        basiscli.merge([family["a"], family["b"]], method="linear", output=tmp_path / "out", engine="ray")
    assert "shared file system" in str(raised.value.remedy)


@pytest.mark.usefixtures("cluster")
def test_relative_paths_count_from_where_the_command_was_given(
    family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(family["a"].parent)
    result = basiscli.merge(["a", "b"], method="linear", output="out", engine="ray")
    assert basiscli.verify(result.path).checked_digests


def journal(out: Path) -> list[str]:
    file = out.with_name(f"{out.name}.partial") / JOURNAL
    return [json.loads(line)["key"] for line in file.read_text().splitlines()[1:]] if file.is_file() else []


@pytest.mark.parametrize("way", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_driver_leaves_what_is_done_and_no_worker(
    family: dict[str, Path], tmp_path: Path, slow: dict[str, object], way: signal.Signals
) -> None:
    """The whole command on a cluster of its own; then it goes on in threads of this machine, which count the same."""
    out, log = tmp_path / "out", tmp_path / "log"
    words = ["merge", family["a"], family["b"], "-m", "slow", "--plugin", tmp_path / "slow.py", "-o", out]
    words += ["-p", f"log={log}", "-p", "seconds=0.4", "--engine", "ray", "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "basiscli", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 90
    while len(journal(out)) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(way)
    printed, message = process.communicate(timeout=60)
    done = journal(out)
    assert 3 <= len(done) < 10
    if way is signal.SIGINT:
        assert process.returncode == 130
        assert message.splitlines()[-1] == "interrupted: the same command goes on where this one stopped"
        assert printed == ""
    workers = {int(pid) for pid in log.read_text().split()}
    assert workers
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert journal(out) == done
    parameters = {"log": str(log), "seconds": 0.4}
    result = basiscli.merge([family["a"], family["b"]], output=out, parameters=parameters, **slow)
    assert result.report.cost.resumed_steps == len(done)
    whole = basiscli.merge([family["a"], family["b"]], output=tmp_path / "whole", parameters=parameters, **slow)
    assert weights(out) == weights(whole.path)


def test_no_cluster_at_that_address(family: dict[str, Path], tmp_path: Path) -> None:
    words = ["merge", family["a"], family["b"], "-m", "linear", "-o", tmp_path / "out", "--engine", "ray"]
    process = basis_process(*words, "--ray-address", "127.0.0.1:9")
    assert process.returncode == 2
    assert "no Ray cluster at 127.0.0.1:9: [Errno 111] Connection refused" in process.stderr
    assert not list(tmp_path.glob("out*"))
