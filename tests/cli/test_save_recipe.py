"""`--save-recipe`: what a command line becomes, and that `basis run` does the same with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import Result

from tests.conftest import make_tensors, read_checkpoint, write_checkpoint

Basis = Callable[..., Result]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, name in enumerate(("base", "a", "b")):
        write_checkpoint(tmp_path / name, make_tensors(seed))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def steps_of(file: Path) -> list[dict[str, object]]:
    return list(yaml.safe_load(file.read_text())["steps"])


def test_a_saved_merge_runs_to_the_same_bytes(folder: Path, basis: Basis) -> None:
    words = ["merge", "a", "b", "-m", "ties", "--base", "base", "-p", "density=[0.3,0.6]", "--weights", "1,0.5"]
    basis(
        *words,
        "--dtype",
        "bf16",
        "--seed",
        "7",
        "-o",
        "first",
        "--save-recipe",
        "recipe.yaml",
        "--fail-if",
        "tensors < 3",
    )
    (step,) = steps_of(folder / "recipe.yaml")
    assert step == {
        "merge": ["a", "b"], "method": "ties", "base": "base", "parameters": {"density": [0.3, 0.6]},
        "weights": [1.0, 0.5], "dtype": "bf16", "seed": 7, "fail_if": ["tensors < 3"],
    }  # fmt: skip
    assert basis("run", "recipe.yaml", "-o", "again").exit_code == 0
    first = (folder / "first" / "model.safetensors").read_bytes()
    assert (folder / "again" / "merge" / "model.safetensors").read_bytes() == first


@pytest.mark.parametrize(
    ("words", "step"),
    [
        (
            ["init", "a", "-m", "pissa", "-r", "2", "--target-modules", "q_proj,up_proj"],
            {"init": "a", "method": "pissa", "rank": 2, "target_modules": ["q_proj", "up_proj"], "seed": 0},
        ),
        (["extract", "a", "--base", "base", "-r", "2"], {"extract": "a", "base": "base", "rank": 2, "seed": 0}),
        (
            ["init", "a", "-m", "pissa", "-r", "2", "--memory", "5GB", "--shard-size", "1GB"],  # each other's defaults
            {"init": "a", "memory": "5GB", "shard_size": "1GB"},
        ),
    ],
)
def test_what_is_saved_runs(folder: Path, basis: Basis, words: list[str], step: dict[str, object]) -> None:
    assert basis(*words, "-o", "first", "--save-recipe", "recipe.yaml").exit_code == 0
    saved = steps_of(folder / "recipe.yaml")[0]
    assert {key: saved[key] for key in step} == step
    assert basis("run", "recipe.yaml", "-o", "again").exit_code == 0
    factors = "adapter/adapter_model.safetensors" if words[0] == "init" else "adapter_model.safetensors"
    assert (folder / "again" / words[0] / factors).read_bytes() == (folder / "first" / factors).read_bytes()


def test_an_expansion_is_saved(folder: Path, basis: Basis) -> None:
    assert basis("extract", "a", "--base", "base", "-r", "24", "-o", "lora").exit_code == 0
    assert basis("expand", "lora", "--base", "base", "-o", "whole", "--save-recipe", "recipe.yaml").exit_code == 0
    assert steps_of(folder / "recipe.yaml") == [{"expand": "lora", "base": "base"}]
    assert basis("run", "recipe.yaml", "-o", "again").exit_code == 0
    first, again = read_checkpoint(folder / "whole"), read_checkpoint(folder / "again" / "expand")
    assert all(first[name].equal(again[name]) for name in first)


def test_a_push_is_a_step_of_its_own(folder: Path, basis: Basis) -> None:
    words = ["merge", "a", "b", "-m", "linear", "--push-to", "org/name", "--dry-run", "--save-recipe", "recipe.yaml"]
    assert basis(*words).exit_code == 0
    assert steps_of(folder / "recipe.yaml")[1] == {"push": "merge", "to": "org/name"}


def test_a_zero_that_means_something_is_kept(folder: Path) -> None:
    """No training at all is not the default."""
    from basiscli.cli.save_recipe import save
    from basiscli.commands.kv import command

    save(folder / "recipe.yaml", command, command.model.of(model=".", train_steps=0, kv_ratio=0.6))
    step = {"compress": ".", "train_steps": 0, "kv_ratio": 0.6, "seed": 0}
    assert step.items() <= steps_of(folder / "recipe.yaml")[0].items()


def test_a_method_of_its_own_options_is_named(folder: Path) -> None:
    """`compress --method nola` is another function: its options are checked as its own."""
    from basiscli.cli.save_recipe import save
    from basiscli.commands.nola import command

    save(folder / "recipe.yaml", command, command.model.of(adapter="lora", bases=8, steps=0))
    step = {"compress": "lora", "method": "nola", "bases": 8, "steps": 0}
    assert step.items() <= steps_of(folder / "recipe.yaml")[0].items()
    assert "train_steps" not in steps_of(folder / "recipe.yaml")[0]


def test_no_recipe_of_what_is_refused_and_none_over_another(folder: Path, basis: Basis) -> None:
    refused = basis("merge", "a", "b", "-m", "ties", "--base", "base", "-p", "densty=1", "--save-recipe", "recipe.yaml")
    assert refused.exit_code == 2
    assert not (folder / "recipe.yaml").exists()
    (folder / "recipe.yaml").write_text("mine")
    again = basis("merge", "a", "b", "-m", "linear", "--save-recipe", "recipe.yaml")
    assert again.exit_code == 2
    assert "the recipe exists" in again.stderr
    assert (folder / "recipe.yaml").read_text() == "mine"
    assert not (folder / "merge-linear").exists()


def test_what_is_off_and_would_be_on_is_written(folder: Path, basis: Basis) -> None:
    done = basis("init", "a", "-m", "eva", "--no-center", "--dry-run", "--save-recipe", "recipe.yaml")
    assert (folder / "recipe.yaml").is_file(), done.stderr
    (step,) = steps_of(folder / "recipe.yaml")
    assert step["center"] is False
