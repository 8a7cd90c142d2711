"""What was lost, or said wrongly, on checkpoints that people have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import Result

import basiscli
from tests.conftest import LLAMA, add, make_tensors, read_checkpoint, write_checkpoint

Basis = Callable[..., Result]


def test_models_without_a_name_of_the_bases_are_refused(family: dict[str, Path], tmp_path: Path, basis: Basis) -> None:
    """Not one tensor would be merged, and the result be the base."""
    other = {f"module.{name}": tensor for name, tensor in make_tensors(1).items()}
    wrapped = write_checkpoint(tmp_path / "wrapped", other)
    words = ["merge", family["a"], wrapped, "--base", family["base"], "-m", "task_arithmetic", "--allow-missing"]
    refused = basis(*words, "-o", tmp_path / "out")
    assert refused.exit_code == 3 and "has no tensor with a name of" in refused.stderr and "'module." in refused.stderr
    assert not (tmp_path / "out").exists()


def test_a_model_that_lacks_some_names_is_still_allowed(family: dict[str, Path], tmp_path: Path) -> None:
    tensors = dict(read_checkpoint(family["a"]))
    del tensors["model.norm.weight"]
    short = write_checkpoint(tmp_path / "short", tensors)
    basiscli.merge([short], base=family["base"], method="task_arithmetic", allow_missing=True, output=tmp_path / "out")
    assert torch.equal(
        read_checkpoint(tmp_path / "out")["model.norm.weight"], read_checkpoint(family["base"])["model.norm.weight"]
    )


def test_a_diff_of_nothing_is_no_zero(tmp_path: Path, basis: Basis) -> None:
    a = write_checkpoint(tmp_path / "a", {"x": torch.ones(3)})
    b = write_checkpoint(tmp_path / "b", {"y": torch.ones(3), "z": torch.ones(2)})
    document = json.loads(basis("diff", a, b, "--json").stdout)
    assert document["relative"] is None and document["identical"] is False
    assert "nothing was compared" in basis("diff", a, b).stdout
    assert json.loads(basis("diff", a, a, "--json").stdout)["relative"] == 0.0


def test_a_git_lfs_pointer_is_called_one(family: dict[str, Path], tmp_path: Path, basis: Basis) -> None:
    (family["a"] / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0123456789\nsize 5\n"
    )
    refused = basis("merge", family["a"], family["b"], "-m", "linear", "-o", tmp_path / "out")
    assert refused.exit_code == 3 and "Git LFS pointer" in refused.stderr and "git lfs pull" in refused.stderr


@pytest.mark.parametrize("keys", [["dtype"], ["torch_dtype"], ["dtype", "torch_dtype"], []], ids=str)
def test_every_dtype_of_a_config_is_the_results(tmp_path: Path, keys: list[str]) -> None:
    named = dict.fromkeys(keys, "float32")
    config = {**LLAMA, **named, "text_config": {"hidden_size": 8, **named}, "vision_config": {"torch_dtype": "float32"}}
    base = make_tensors(0)
    folders = [write_checkpoint(tmp_path / n, add(base, make_tensors(i)), config) for i, n in enumerate("ab", 1)]
    made = basiscli.merge(folders, method="linear", dtype="bf16", output=tmp_path / "out")
    found = json.loads((made.path / "config.json").read_text())
    assert {key: found[key] for key in keys or ["dtype"]} == dict.fromkeys(keys or ["dtype"], "bfloat16")
    assert found["text_config"] == {"hidden_size": 8, **dict.fromkeys(keys, "bfloat16")}
    assert found["vision_config"] == {"torch_dtype": "bfloat16"}


def test_running_statistics_are_the_fine_tunes(tmp_path: Path) -> None:
    """One fine-tune at λ = 1 is that fine-tune, with the statistics that its weights were trained with."""
    names = ("bn.weight", "bn.running_mean", "bn.running_var")
    base = {name: torch.rand(4) for name in names} | {"bn.num_batches_tracked": torch.tensor(7)}
    tuned = {name: tensor + 1 if tensor.is_floating_point() else tensor + 3 for name, tensor in base.items()}
    folders = [write_checkpoint(tmp_path / name, t, {}) for name, t in (("base", base), ("tuned", tuned))]
    made = basiscli.merge(
        [folders[1]], base=folders[0], method="task_arithmetic", parameters={"lambda": 1.0}, output=tmp_path / "out"
    )
    found = read_checkpoint(made.path)
    for name in names:
        torch.testing.assert_close(found[name], tuned[name])
