"""Pipelines: every command as a step, what is redone and what is not, and what is refused before anything is done."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import Result

import basiscli.commands.run.pipeline
from basiscli.commands.run.api import plan_run, run
from basiscli.commands.run.pipeline import Pipeline, StepResult
from basiscli.commands.run.price import price
from basiscli.commands.run.state import STATE
from basiscli.errors import GateFailed, HubError, UsageError
from basiscli.hub.client import Pushed
from basiscli.progress import Silent
from tests.conftest import add, make_tensors, read_checkpoint, snapshot, write_checkpoint
from tests.kv_models import make_text
from tests.recipes.models import refused, write_llama, write_recipe

EVAL = {"length": 16, "windows": 1, "text": "words.txt"}
STEPS: list[dict[str, Any]] = [
    {"merge": ["a", "b"], "name": "merged", "method": "linear", "weights": [1, 3]},
    {"extract": "merged", "name": "lora", "base": "base", "rank": 2},
    {"expand": "lora", "name": "whole"},
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder with a base, fine-tunes `a` and `b`, and a text."""
    monkeypatch.chdir(tmp_path)
    base = {name: t for name, t in make_tensors(0).items() if t.ndim in (1, 2) and t.numel()}
    write_checkpoint(tmp_path / "base", base)
    for seed, name in enumerate("ab", start=1):
        tensors = add(base, {n: t for n, t in make_tensors(seed).items() if n in base})
        write_checkpoint(tmp_path / name, tensors)
    (tmp_path / "words.txt").write_text(make_text())
    return tmp_path


@pytest.fixture
def llamas(here: Path) -> Path:
    """Return the same folder with models that transformers loads."""
    for seed, name in enumerate(("base", "a", "b")):
        shutil.rmtree(here / name)
        write_llama(here / name, seed)
    return here


def pipeline(here: Path, steps: list[dict[str, Any]], **options: Any) -> Pipeline:
    planned = plan_run(write_recipe(here, {"steps": steps}, "work.yaml"), **options)
    assert isinstance(planned, Pipeline)
    return planned


def done(here: Path, steps: list[dict[str, Any]], **options: Any) -> dict[str, bool]:
    """Run steps; return for each whether it was done now."""
    results = pipeline(here, steps, **options).run(Silent(), lambda result: None)
    return {result.name: not result.done_before for result in results}


def dense(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in read_checkpoint(folder).items()}


# What the steps do ----------------------------------------------------------------------------------------------------


def test_outputs_feed_the_next_step(here: Path) -> None:
    steps = [*STEPS, {"init": "merged", "name": "start", "method": "pissa", "rank": 2}]
    steps += [{"merge": ["start/residual", "whole"], "name": "last", "method": "linear"}]
    assert done(here, steps) == dict.fromkeys(["merged", "lora", "whole", "start", "last"], True)
    a, b, merged = dense(here / "a"), dense(here / "b"), dense(here / "work" / "merged")
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, (a[name] + 3 * b[name]) / 4, rtol=1e-6, atol=1e-6)
    base, whole = dense(here / "base"), dense(here / "work" / "whole")
    name = "model.layers.0.mlp.up_proj.weight"
    u, s, vh = torch.linalg.svd(merged[name] - base[name])
    torch.testing.assert_close(whole[name], base[name] + u[:, :2] * s[:2] @ vh[:2], rtol=1e-4, atol=1e-5)
    residual, last = dense(here / "work" / "start" / "residual"), dense(here / "work" / "last")
    torch.testing.assert_close(last[name], (residual[name] + whole[name]) / 2, rtol=1e-5, atol=1e-6)


def test_every_command_is_a_step(llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[tuple[Any, ...]] = []

    def upload(files: dict[str, Path], repo_id: str, **options: Any) -> Pushed:
        pushed.append((files["config.json"], repo_id, options["private"]))
        return Pushed(repo_id, "main", "0123abc", f"https://hub/{repo_id}", pull_request=False, removed=[])

    monkeypatch.setattr("basiscli.commands.push.api.check_login", lambda repo_id: None)
    monkeypatch.setattr("basiscli.commands.push.api.upload", upload)
    quick = {"calibration": "words.txt", "length": 16}
    steps = [
        {"merge": ["a", "b"], "name": "merged", "method": "linear"},
        {"extract": "merged", "name": "lora", "base": "base", "rank": 2},
        {"expand": "lora", "name": "whole", "base": "base"},
        {"init": "whole", "name": "eva", "method": "eva", "rank": 2, "tokens": 64, **quick},
        {"compress": "whole", "name": "small", "kv_ratio": 0.5, "train_steps": 0, "search": "uniform", **quick},
        {"eval": "small", "against": "whole", **EVAL, "fail_if": ["cache_kept > 0.6", "kl < 0"]},
        {"push": "small", "to": "org/small", "private": True},
    ]
    results = pipeline(llamas, steps).run(Silent(), lambda result: None)
    assert [one.command for one in results] == [next(iter(step)) for step in steps]
    figures = json.loads((llamas / "work" / "eval.json").read_text())
    assert figures["numbers"].keys() == results[5].numbers.keys()
    assert figures["numbers"]["kl"] == pytest.approx(results[5].numbers["kl"])
    assert figures["against"]["model"] == str(llamas / "work" / "whole")
    assert not any(outcome.failed for outcome in results[5].gates)
    assert (results[6].url, results[6].path) == ("https://hub/org/small", None)
    assert pushed == [(llamas / "work" / "small" / "config.json", "org/small", True)]
    assert not any(done(llamas, steps).values())
    assert len(pushed) == 1


def test_an_adapter_is_compressed_by_nola(llamas: Path) -> None:
    steps = [
        {"extract": "a", "name": "lora", "base": "base", "rank": 1},
        {"compress": "lora", "method": "nola", "bases": 8, "weights_only": True, "force": True},
    ]
    assert all(done(llamas, steps).values())
    assert json.loads((llamas / "work" / "compress" / "adapter_config.json").read_text())["peft_type"] == "NOLA"
    assert not any(done(llamas, steps).values())
    refused(lambda: pipeline(llamas, [steps[0], steps[1] | {"kv_ratio": 0.5}]), "'kv_ratio'", "steps.1")


# What is redone -------------------------------------------------------------------------------------------------------


def test_nothing_is_redone_and_a_touched_file_is_no_change(here: Path) -> None:
    done(here, STEPS)
    before = snapshot(here / "work")
    assert done(here, STEPS) == {"merged": False, "lora": False, "whole": False}
    assert snapshot(here / "work") == before
    for file in (here / "a" / "model.safetensors", here / "work" / "lora" / "adapter_model.safetensors"):
        os.utime(file, (1, 1))
    assert not any(done(here, STEPS).values())


def test_a_changed_input_redoes_what_depends_on_it(here: Path) -> None:
    steps = [*STEPS, {"merge": ["base", "b"], "name": "other", "method": "linear"}]
    done(here, steps)
    tensors = load_file(here / "a" / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, here / "a" / "model.safetensors", {"format": "pt"})
    # The adapter is of linear weights, and the norm is none: its bytes, and what follows, stay.
    assert done(here, steps) == {"merged": True, "lora": True, "whole": False, "other": False}
    tensors["model.layers.0.mlp.up_proj.weight"][0] += 1
    save_file(tensors, here / "a" / "model.safetensors", {"format": "pt"})
    assert done(here, steps) == {"merged": True, "lora": True, "whole": True, "other": False}
    assert not any(done(here, steps).values())


def test_a_base_that_only_the_adapter_names_is_an_input(here: Path) -> None:
    done(here, STEPS)
    tensors = load_file(here / "base" / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, here / "base" / "model.safetensors", {"format": "pt"})
    assert done(here, STEPS) == {"merged": False, "lora": True, "whole": True}


@pytest.mark.parametrize(
    ("step", "change", "redone"),
    [
        (0, {"weights": [1, 4]}, {"merged", "lora", "whole"}),
        (1, {"rank": 3}, {"lora", "whole"}),
        (1, {"alpha": 7}, {"lora", "whole"}),
        (2, {"base": "base"}, {"whole"}),
        (0, {"workers": 1}, set()),
        (1, {"fail_if": "modules < 1"}, set()),
    ],
)
def test_a_changed_option_redoes_what_depends_on_it(
    here: Path, step: int, change: dict[str, Any], redone: set[str]
) -> None:
    done(here, STEPS)
    changed = [one | (change if place == step else {}) for place, one in enumerate(STEPS)]
    assert {name for name, now in done(here, changed).items() if now} == redone


def test_the_same_word_under_another_option_is_another_step(here: Path) -> None:
    steps = [{"merge": ["a"], "name": "one", "method": "task_arithmetic", "base": "base"}]
    steps += [{"merge": ["b"], "name": "two", "method": "task_arithmetic", "base": "base"}]
    done(here, steps)
    steps[1] = {"merge": ["b"], "name": "two", "method": "task_arithmetic", "onto": "one", "base": "base"}
    assert done(here, steps) == {"one": False, "two": True}
    planned = pipeline(here, STEPS)
    onto, base = ({"merge": ["b"], "method": "linear", word: "a"} for word in ("onto", "base"))
    keys = {planned.key(pipeline(here, [one]).steps[0], {}) for one in (onto, base)}
    assert len(keys) == 2


@pytest.mark.parametrize("damage", ["flipped", "missing", "extra", "gone"])
def test_a_damaged_output_is_made_again(here: Path, damage: str) -> None:
    done(here, STEPS)
    whole, lora = dense(here / "work" / "whole"), here / "work" / "lora"
    file = lora / "adapter_model.safetensors"
    if damage == "flipped":
        file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    elif damage == "missing":
        file.unlink()
    elif damage == "extra":
        (lora / "more.txt").write_text("more")
    else:
        shutil.rmtree(lora)
    assert done(here, STEPS) == {"merged": False, "lora": True, "whole": False}
    assert all(torch.equal(one, whole[name]) for name, one in dense(here / "work" / "whole").items())
    assert not (lora / "more.txt").exists()


def test_a_changed_plugin_is_noticed(here: Path) -> None:
    text = (
        'from basiscli import transform\n\n\n@transform("merge", elementwise=True, source="")\n'
        'def first(others):\n    """Take the first."""\n    return others[0] * {}\n'
    )
    (here / "first.py").write_text(text.format(1))
    steps = [{"merge": ["a", "b"], "method": "first", "plugins": ["first.py"]}]
    assert done(here, steps) == {"merge": True}
    assert done(here, steps) == {"merge": False}
    (here / "first.py").write_text(text.format(2))
    assert done(here, steps) == {"merge": True}
    name = "model.norm.weight"
    torch.testing.assert_close(dense(here / "work" / "merge")[name], 2 * dense(here / "a")[name])


def test_another_version_of_basis_does_everything_again(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done(here, STEPS)
    monkeypatch.setattr(basiscli.commands.run.pipeline, "__version__", "999")
    assert all(done(here, STEPS).values())


def test_an_expanded_adapter_is_replaced_though_it_has_no_report(here: Path) -> None:
    steps = [
        {"init": "a", "name": "start", "method": "pissa", "rank": 2},
        {"expand": "start/adapter", "name": "plain", "initial": "start/adapter", "base": "a"},
    ]
    done(here, steps)
    assert not (here / "work" / "plain" / "basis_report.json").exists()
    steps[0]["rank"] = 3
    assert all(done(here, steps).values())


@pytest.mark.parametrize("damage", ["{", "[]", '{"steps": {"merged": 1}, "digests": {}}', '{"steps": 1, "digests": 2}'])
def test_a_damaged_record_counts_as_none(here: Path, damage: str) -> None:
    done(here, STEPS)
    (here / "work" / STATE).write_text(damage)
    with pytest.raises(UsageError, match="'merged' is there already"):
        pipeline(here, STEPS)
    assert all(done(here, STEPS, overwrite=True).values())


# Interruptions and gates ----------------------------------------------------------------------------------------------


def test_an_interrupted_pipeline_goes_on(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from basiscli.commands.init.run import InitRun

    def stop(self: InitRun) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(InitRun, "run", stop)
        with pytest.raises(KeyboardInterrupt):
            done(here, STEPS)
    assert not (here / "work" / "lora").exists()
    assert done(here, STEPS) == {"merged": False, "lora": True, "whole": True}


def test_a_step_that_ended_before_it_was_noted_is_no_obstacle(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from basiscli.commands.run.state import State

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(State, "record", die)
        with pytest.raises(KeyboardInterrupt):
            done(here, STEPS)
    assert (here / "work" / "merged").exists()
    assert all(done(here, STEPS).values())


def test_a_gate_that_fails_ends_the_pipeline_and_the_output_stays(here: Path, basis: Callable[..., Result]) -> None:
    steps = [STEPS[0] | {"fail_if": ["tensors < 1", "tensors > 2"]}, *STEPS[1:]]
    file = write_recipe(here, {"steps": steps}, "work.yaml")
    result = basis("run", file)
    assert result.exit_code == 4
    assert "gate 'tensors > 2'" in result.stderr and "the steps after 'merged' were not done" in result.stderr
    assert (here / "work" / "merged").is_dir() and not (here / "work" / "lora").exists()

    result = basis("run", file, "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == document["exit_code"] == 4
    (step,) = document["steps"]
    assert (step["name"], step["done_before"]) == ("merged", True)
    assert [gate["failed"] for gate in step["gates"]] == [False, True]


def test_numbers_that_are_none_are_words_in_json(llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from basiscli.commands.evaluate.api import Evaluation

    monkeypatch.setattr(Evaluation, "numbers", property(lambda _: {"kl": float("inf"), "accuracy_kept": float("nan")}))
    (result,) = pipeline(llamas, [{"eval": "a", **EVAL}]).run(Silent(), lambda result: None)
    assert result.as_dict()["numbers"] == {"kl": "inf", "accuracy_kept": "nan"}
    (again,) = pipeline(llamas, [{"eval": "a", **EVAL}]).run(Silent(), lambda result: None)
    assert again.done_before and again.numbers["kl"] == float("inf")
    strange: list[str] = []
    for file in (llamas / "work" / "eval.json", llamas / "work" / STATE):
        json.loads(file.read_text(), parse_constant=strange.append)
    assert not strange


def test_a_push_that_fails_names_the_step(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(repo_id: str) -> None:
        raise HubError("nobody is logged in", remedy="hf auth login")

    monkeypatch.setattr("basiscli.commands.push.api.check_login", nobody)
    with pytest.raises(HubError, match="step 'push': nobody is logged in"):
        done(here, [STEPS[0], {"push": "merged", "to": "org/name"}])
    assert done(here, STEPS[:1]) == {"merged": False}


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([], ["no steps"]),
        ([{"name": "x", "merg": ["a"]}], ["steps.0: no command", "did you mean 'merge'"]),
        ([{"merge": ["a"], "eval": "a"}], ["steps.0: merge and eval", "one command"]),
        ([{"merge": ["a"], "method": "linear", "wieghts": [1]}], ["'wieghts' (steps.0.wieghts)", "'weights'"]),
        ([{"merge": ["a"]}], ["steps.0.method", "Field required"]),
        ([{"merge": "a", "method": "linear"}], ["steps.0.merge", "valid list"]),
        ([{"merge": ["a", "b"], "method": "linear", "output": "x"}], ["'output'"]),
        ([{"merge": ["a", "b"], "method": "linear", "overwrite": True}], ["'overwrite'"]),
        ([{"extract": "a", "rank": 2}], ["steps.0.base", "Field required"]),
        ([{"extract": "a", "base": "base", "rank": "two"}], ["steps.0.rank", "valid integer"]),
        ([{"push": "a"}], ["steps.0.to"]),
        ([{"expand": "a", "fail_if": "tensors > 1"}], ["'fail_if'"]),
        ([{"eval": "a", "fail_if": "perplexty > 1"}], ["steps.0.fail_if", "did you mean 'perplexity'"]),
        ([{"eval": "a", "fail_if": "kl > 1"}], ["no number 'kl'"]),
        ([{"eval": "a", "fail_if": "import os"}], ["steps.0.fail_if", "not a condition"]),
        ([{"eval": "a", "name": "../x"}], ["'../x' is no name"]),
        ([{"eval": "a", "name": "x.json"}], ["is no name"]),
        ([{"eval": "a", "name": "basis_pipeline"}], ["is no name"]),
        ([{"eval": "a", "name": "x"}, {"eval": "b", "name": "x"}], ["two steps are called 'x'"]),
        ([{"extract": "later", "base": "base", "rank": 1}, STEPS[0] | {"name": "later"}], ["comes later"]),
        ([{"expand": "later/adapter"}, STEPS[0] | {"name": "later"}], ["comes later"]),
        ([STEPS[0] | {"merge": ["a", "merged"]}], ["takes what itself makes"]),
    ],
)
def test_what_is_no_pipeline_is_refused_and_nothing_is_written(
    here: Path, steps: list[dict[str, Any]], said: list[str]
) -> None:
    refused(lambda: pipeline(here, steps), "work.yaml", *said)
    assert not (here / "work").exists()


def test_steps_without_names_get_their_commands(here: Path) -> None:
    merge = {"merge": ["a", "b"], "method": "linear"}
    assert list(done(here, [merge, merge])) == ["merge", "merge-2"]
    assert sorted(item.name for item in (here / "work").iterdir()) == [STATE, "merge", "merge-2"]


def test_an_earlier_step_goes_before_a_folder_of_its_name_which_a_dot_names(here: Path) -> None:
    one = {"merge": ["a", "b"], "name": "b", "method": "linear"}
    results = done(here, [one, {"merge": ["a", "b"], "name": "naming_step", "method": "linear"}])
    assert all(results.values())
    done(here, [one, {"merge": ["a", "./b"], "name": "of_folder", "method": "linear"}])
    a, b, name = dense(here / "a"), dense(here / "b"), "model.norm.weight"
    torch.testing.assert_close(dense(here / "work" / "naming_step")[name], (3 * a[name] + b[name]) / 4)
    torch.testing.assert_close(dense(here / "work" / "of_folder")[name], (a[name] + b[name]) / 2)


def test_paths_are_relative_to_the_current_folder_and_not_to_the_recipe(here: Path) -> None:
    (here / "recipes").mkdir()
    file = write_recipe(here / "recipes", {"steps": STEPS[:1]}, "deep.yaml")
    assert run(file).path == here / "deep"
    assert (here / "deep" / "merged").is_dir()
    assert run(file, output="elsewhere").path == here / "elsewhere"


def test_a_folder_that_no_recipe_made_is_never_replaced(here: Path, basis: Callable[..., Result]) -> None:
    (here / "work").mkdir()
    (here / "work" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="no recipe made it"):
        pipeline(here, STEPS)
    assert all(done(here, STEPS, overwrite=True).values())
    assert (here / "work" / "thesis.txt").read_text() == "years of work"

    mine = here / "mine" / "merged"
    mine.mkdir(parents=True)
    (mine / "thesis.txt").write_text("years of work")
    for more in ([], ["--overwrite"]):
        result = basis("run", write_recipe(here, {"steps": STEPS}, "work.yaml"), "-o", here / "mine", *more)
        assert result.exit_code == 2, result.output
    assert [item.name for item in mine.iterdir()] == ["thesis.txt"]


def test_a_step_added_to_a_recipe_does_not_take_what_is_there(llamas: Path) -> None:
    done(llamas, [{"merge": ["a", "b"], "name": "merged", "method": "linear"}])
    (llamas / "work" / "eval.json").write_text("mine")
    with pytest.raises(UsageError, match="'eval' is there already"):
        pipeline(llamas, [{"eval": "a", **EVAL}])
    assert (llamas / "work" / "eval.json").read_text() == "mine"


def test_results_do_not_go_into_an_input(here: Path) -> None:
    file = write_recipe(here, {"steps": STEPS}, "a.yaml")
    with pytest.raises(UsageError, match="inside an input"):
        plan_run(file, overwrite=True)
    with pytest.raises(UsageError, match="inside an input"):
        plan_run(file, output=here / "base" / "out")


def test_options_of_a_merge_are_refused_for_a_pipeline(here: Path, basis: Callable[..., Result]) -> None:
    file = write_recipe(here, {"steps": STEPS}, "work.yaml")
    for words in (["--device", "cpu"], ["--dtype", "f16"], ["--seed", "0"], ["--no-resume"], ["--plugin", "x.py"]):
        result = basis("run", file, *words)
        assert result.exit_code == 2, result.output
        assert "options of their own" in result.stderr
    assert basis("run", file, "--fail-if", "tensors > 1").exit_code == 2
    assert not (here / "work").exists()


# Prices ---------------------------------------------------------------------------------------------------------------


def test_a_dry_run_prices_every_step_and_writes_nothing(here: Path, basis: Callable[..., Result]) -> None:
    steps = [*STEPS, {"init": "merged", "name": "start", "method": "pissa", "rank": 2}]
    steps += [{"merge": ["start/residual", "a"], "name": "last", "method": "linear"}]
    steps += [{"merge": ["lora", "start/adapter"], "name": "ends", "method": "ortho", "base": "base"}]
    steps += [{"merge": ["whole", "a"], "name": "unknown", "method": "linear"}]
    file, before = write_recipe(here, {"steps": steps}, "work.yaml"), snapshot(here)
    result = basis("run", file, "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    plans = {one["name"]: one for one in json.loads(result.stdout)["steps"]}
    before |= {str(file): file.read_bytes()}
    assert snapshot(here) == before and not (here / "work").exists()

    done(here, steps)
    for name, plan in plans.items():
        assert plan["path"] == str(here / "work" / name)
        if name in {"whole", "unknown"}:  # how large an expanded adapter is, only the work tells
            assert plan["write_bytes"] is None
        else:
            size = sum(file.stat().st_size for file in (here / "work" / name).rglob("*.safetensors"))
            assert plan["write_bytes"] == size
            assert plan["read_bytes"] > 0 and plan["peak_bytes"] > 0
            assert plan["price"]["write_bytes"] == size and plan["price"]["seconds"] > 0

    before = snapshot(here)
    assert all(plan.done_before for plan in price(pipeline(here, steps)))
    steps[1] = steps[1] | {"rank": 3}
    states = {plan.name: plan.done_before for plan in price(pipeline(here, steps))}
    assert states == {"merged": True, "lora": False, "whole": False, "start": True, "last": True} | dict.fromkeys(
        ["ends", "unknown"], False
    )
    assert {k: v for k, v in snapshot(here).items() if "work.yaml" not in k} == {
        k: v for k, v in before.items() if "work.yaml" not in k
    }


def test_a_dry_run_finds_what_a_later_step_would_refuse(here: Path) -> None:
    steps = [STEPS[0], STEPS[1] | {"rank": 10_000}]
    with pytest.raises(UsageError, match="step 'lora'"):
        price(pipeline(here, steps))


def test_the_documents(here: Path, basis: Callable[..., Result]) -> None:
    file = write_recipe(here, {"steps": STEPS}, "work.yaml")
    first, second = (json.loads(basis("run", file, "--json").stdout) for _ in range(2))
    assert first["output"] == second["output"] == str(here / "work")
    for step in first["steps"]:
        assert step["path"] == str(here / "work" / step["name"])
        assert step["done_before"] is False
    assert first["steps"][0]["numbers"]["tensors"] == len(read_checkpoint(here / "a"))
    for before, after in zip(first["steps"], second["steps"], strict=True):
        assert after == before | {"done_before": True}
    shown = basis("run", file)
    assert shown.stdout.strip() == str(here / "work")
    assert "merged (merge): nothing changed" in shown.stderr
    assert "nothing changed" in basis("run", file, "--dry-run").stdout


def test_each_step_is_told_when_it_is_done(here: Path) -> None:
    told: list[StepResult] = []
    with pytest.raises(GateFailed):
        steps = [STEPS[0], STEPS[1] | {"fail_if": "modules > 0"}, STEPS[2]]
        pipeline(here, steps).run(Silent(), told.append)
    assert [one.name for one in told] == ["merged", "lora"]
