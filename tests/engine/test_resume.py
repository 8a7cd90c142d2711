"""Interrupted runs: killed at any moment, the same command ends with the same bytes and repeats nothing finished."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

import basiscli
from basiscli.checkpoints.shards import JOURNAL
from basiscli.checkpoints.writer import PartialOutput
from basiscli.commands.merge.run import MergeRun
from tests.conftest import add, make_tensors, python_process, read_checkpoint, write_checkpoint

METHODS = ["linear", "ortho"]
# A merge that rests after every step from one on, so that a signal finds it between two of them.
RESTING = """
import signal, sys, time
from basiscli.checkpoints.shards import JOURNAL
from basiscli.checkpoints.writer import PartialOutput
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
record, steps, seconds = PartialOutput.record, int(sys.argv.pop(1)), float(sys.argv.pop(1))
def rest(self, key, entry):
    record(self, key, entry)
    if len((self.folder / JOURNAL).read_text().splitlines()) > steps:  # the first is the run's
        time.sleep(seconds)
PartialOutput.record = rest
from basiscli.app import main
main()
"""


def words(family: dict[str, Path], method: str, out: Path) -> list[str]:
    inputs = [str(family["a"]), str(family["b"])]
    return ["merge", *inputs, "--base", str(family["base"]), "-m", method, "-o", str(out), "--workers", "2"]


def journal(out: Path) -> list[str]:
    """Return the finished steps that a partial output records."""
    file = out.with_name(f"{out.name}.partial") / JOURNAL
    lines = file.read_text().splitlines()[1:] if file.is_file() else []
    return [json.loads(line)["key"] for line in lines if line.endswith("}")]


def stopped_after(family: dict[str, Path], method: str, out: Path, steps: int, number: signal.Signals) -> str:
    """Send a merge a signal when it has finished so many steps; return what it says."""
    rests = [str(steps), "60" if number == signal.SIGKILL else "0.5"]  # Ctrl-C waits for what is at work
    process = python_process("-c", RESTING, *rests, *words(family, method, out))
    while len(journal(out)) < steps and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(number)
    _, message = process.communicate(timeout=60)
    assert process.returncode == (-number if number == signal.SIGKILL else 130)
    return message


@pytest.mark.parametrize("method", METHODS)
def test_killed_at_several_moments_it_finishes_with_the_same_bytes(
    family: dict[str, Path], tmp_path: Path, method: str
) -> None:
    options = {"method": method, "base": family["base"], "workers": 2}
    undisturbed = basiscli.merge([family["a"], family["b"]], output=tmp_path / "whole", **options)
    out = tmp_path / "killed"
    seen: set[str] = set()
    for steps in (1, 3, 6, 9, 12, 15):
        stopped_after(family, method, out, steps, signal.SIGKILL)
        assert not out.exists()
        done = journal(out)
        assert len(done) == len(set(done))  # no step was done twice
        assert seen <= set(done)  # and none was lost
        seen = set(done)
        if len(done) >= (9 if method == "linear" else 18):
            break
    assert len(seen) > 3
    finished = basiscli.merge([family["a"], family["b"]], output=out, **options)
    assert finished.report.cost.resumed_steps == len(seen)
    for file in ("model.safetensors", "config.json"):
        assert (out / file).read_bytes() == (undisturbed.path / file).read_bytes()
    assert finished.report.weights_digest == undisturbed.report.weights_digest
    assert not out.with_name("killed.partial").exists()
    assert not (out / JOURNAL).exists()


@pytest.mark.parametrize("moment", ["before the rename", "after the rename"])
def test_killed_around_the_rename(
    family: dict[str, Path], tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    take_the_name = PartialOutput._take_the_name

    def killed(self: PartialOutput, overwrite: bool) -> None:
        if moment == "after the rename":
            take_the_name(self, overwrite)
        raise KeyboardInterrupt

    monkeypatch.setattr(PartialOutput, "_take_the_name", killed)
    with pytest.raises(KeyboardInterrupt):
        basiscli.merge([family["a"], family["b"]], method="linear", output=out)
    monkeypatch.undo()
    if moment == "after the rename":
        assert basiscli.verify(out).checked_digests
        return
    assert not out.exists()
    result = basiscli.merge([family["a"], family["b"]], method="linear", output=out)
    assert result.report.cost.resumed_steps == len(read_checkpoint(out))


def interrupt(family: dict[str, Path], out: Path, monkeypatch: pytest.MonkeyPatch, steps: int = 4) -> None:
    """Leave a partial output with so many finished steps."""
    record = PartialOutput.record

    def stop(self: PartialOutput, key: str, entry: dict[str, object]) -> None:
        if len(self.finished) >= steps:
            raise KeyboardInterrupt
        record(self, key, entry)

    with monkeypatch.context() as patch:
        patch.setattr(PartialOutput, "record", stop)
        with pytest.raises(KeyboardInterrupt):
            basiscli.merge([family["a"], family["b"]], method="linear", output=out, workers=1)


def test_bytes_that_did_not_reach_the_disk_are_written_again(
    family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupt(family, out, monkeypatch)
    weights = tmp_path / "out.partial" / "model.safetensors"
    size = weights.stat().st_size
    with weights.open("r+b") as stream:  # a machine that lost power: the journal is there, the data is not
        stream.seek(size // 2)
        stream.write(bytes(size - size // 2))
    result = basiscli.merge([family["a"], family["b"]], method="linear", output=out)
    assert basiscli.verify(out).weights_digest == result.report.weights_digest
    whole = basiscli.merge([family["a"], family["b"]], method="linear", output=tmp_path / "whole")
    assert result.report.weights_digest == whole.report.weights_digest


def test_other_inputs_or_parameters_start_anew(
    family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupt(family, out, monkeypatch)
    write_checkpoint(family["b"], add(make_tensors(0), make_tensors(9)))
    result = basiscli.merge([family["a"], family["b"]], method="linear", output=out)
    assert result.report.cost.resumed_steps == 0
    interrupt(family, tmp_path / "other", monkeypatch)
    weighted = basiscli.merge([family["a"], family["b"]], method="linear", weights=[1, 2], output=tmp_path / "other")
    assert weighted.report.cost.resumed_steps == 0


def test_no_resume_starts_anew(family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(family, tmp_path / "out", monkeypatch)
    result = basiscli.merge([family["a"], family["b"]], method="linear", output=tmp_path / "out", resume=False)
    assert result.report.cost.resumed_steps == 0


def test_a_cut_off_journal_line_is_no_finished_step(
    family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupt(family, out, monkeypatch)
    with (tmp_path / "out.partial" / JOURNAL).open("ab") as stream:
        stream.write(b'{"key": "merge:model.norm.weight", "dig')
    result = basiscli.merge([family["a"], family["b"]], method="linear", output=out)
    assert result.report.cost.resumed_steps == 4
    assert basiscli.verify(out).checked_digests


def test_ctrl_c_says_how_to_go_on(family: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "the same command goes on" in stopped_after(family, "ortho", out, 1, signal.SIGINT)
    assert not out.exists()


def test_scratch_goes_as_soon_as_its_tensor_is_written(
    family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = []
    write_sum = MergeRun._write_sum

    def count(self: MergeRun, name: str, *merged: object) -> dict[str, object]:
        left.append(len(list(self.output.scratch.iterdir())))
        return write_sum(self, name, *merged)

    monkeypatch.setattr(MergeRun, "_write_sum", count)
    basiscli.merge([family["a"]], method="ortho", base=family["base"], output=tmp_path / "out", workers=1)
    assert left == sorted(left, reverse=True)
    assert left[0] > left[-1]


def test_scratch_that_did_not_reach_the_disk_is_made_again(
    family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"method": "ortho", "base": family["base"], "workers": 1}
    whole = basiscli.merge([family["a"], family["b"]], output=tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        patch.setattr(MergeRun, "_write_sum", interrupted)
        with pytest.raises(KeyboardInterrupt):
            basiscli.merge([family["a"], family["b"]], output=tmp_path / "out", **options)
    first, second, *_ = sorted((tmp_path / "out.partial" / "scratch").iterdir())
    first.write_bytes(bytes(first.stat().st_size))
    second.unlink()
    result = basiscli.merge([family["a"], family["b"]], output=tmp_path / "out", **options)
    assert result.report.weights_digest == whole.report.weights_digest


def interrupted(self: MergeRun, name: str, *merged: object) -> dict[str, object]:
    raise KeyboardInterrupt
