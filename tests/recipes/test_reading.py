"""Recipes as files: values that depend on the tensor, and everything that is refused before the work begins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter
from typer.testing import Result

from basiscli.commands.run.api import plan_run, run
from basiscli.commands.run.mergekit import parse_mergekit
from basiscli.commands.run.reading import read_yaml
from basiscli.commands.run.setting import Setting, value_at
from basiscli.commands.run.steps import read_steps
from tests.recipes.models import refused, write_family, write_recipe

EXAMPLES = Path(__file__).parents[2] / "examples" / "recipes"

ATTENTION = "model.layers.1.self_attn.q_proj.weight"
MLP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("written", "tensor", "depth", "expected"),
    [
        ("0.3", ATTENTION, 0.7, 0.3),
        ("true", ATTENTION, 0.7, True),
        # A gradient: its numbers at equal distances over the layers, straight lines between them.
        ("[0, 1]", ATTENTION, 0.25, 0.25),
        ("[0, 0.5, 0.3, 0.7, 1]", ATTENTION, 0.0, 0.0),
        ("[0, 0.5, 0.3, 0.7, 1]", ATTENTION, 1 / 3, 0.5 + (4 / 3 - 1) * (0.3 - 0.5)),
        ("[0, 0.5, 0.3, 0.7, 1]", ATTENTION, 1.0, 1.0),
        ("[5]", ATTENTION, 0.6, 5.0),
        ("[1e-5, 3e-5]", ATTENTION, 0.5, 2e-5),  # words to YAML 1.1, which asks for a point
        # Words and truth values do not blend: the one at or before the place.
        ("[true, false, true]", ATTENTION, 0.4, True),
        ("[true, false, true]", ATTENTION, 0.5, False),
        ("[one, two]", ATTENTION, 0.99, "one"),
        ("[one, two]", ATTENTION, 1.0, "two"),
        # The first filter that is part of the name decides.
        ("[{filter: mlp, value: 0.5}, {value: 0.1}]", MLP, 0.0, 0.5),
        ("[{filter: mlp, value: 0.5}, {value: 0.1}]", ATTENTION, 0.0, 0.1),
        ("[{filter: mlp, value: 0.5}, {filter: '*', value: [0, 1]}]", ATTENTION, 0.5, 0.5),
        ("{filter: self_attn, value: [0, 1]}", ATTENTION, 0.5, 0.5),
        ("{filter: self_attn, value: [0, 1]}", MLP, 0.5, None),
        ("[{filter: mlp, value: 1}]", ATTENTION, 0.5, None),
        ("[]", ATTENTION, 0.5, None),
    ],
)
def test_a_setting_has_the_value_that_mergekit_documents(
    written: str, tensor: str, depth: float, expected: object
) -> None:
    setting: Any = TypeAdapter(Setting).validate_python(yaml.safe_load(written))
    found = value_at(setting, tensor, depth)
    assert found == (pytest.approx(expected) if isinstance(expected, float) else expected)
    assert type(found) is type(expected) or isinstance(expected, float)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("models: [{model: a}]\nmerge_metod: linear", ["'merge_metod'", "did you mean 'merge_method'"]),
        ("merge_method: linear\nmodels: [{modle: a}]", ["'modle' (models.0.modle)", "did you mean 'model'"]),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {weight: {valeu: 1}}}]",
            ["'valeu'", "models.0.parameters.weight", "did you mean 'value'"],
        ),
        (
            "merge_method: slerp\nslices: [{sources: [{model: a, layer_rang: [0, 1]}]}]",
            ["slices.0.sources.0.layer_rang", "did you mean 'layer_range'"],
        ),
        (
            "merge_method: linear\nmodels: [{model: a}]\ntokenizer: {sauce: union}",
            ["'sauce' (tokenizer.sauce)", "did you mean 'source'"],
        ),
        (
            "merge_method: linear\nmodels: [{model: {model: {path: a, revison: x}}}]",
            ["models.0.model", "unknown key 'revison'"],
        ),
        ("merge_method: linear\nmodels: [{model: 7}]", ["models.0.model", "not 7"]),
        ("merge_method: linear\nmodels: [{model: a+b+c}]", ["models.0.model", "path@revision+adapter"]),
        ("merge_method: linear\nmodels: []", ["models", "at least 1"]),
        ("merge_method: linear", ["one of 'models', 'slices' and 'modules'"]),
        ("merge_method: linear\nmodels: [{model: a}]\nslices: [{sources: []}]", ["slices.0.sources"]),
        (
            "merge_method: slerp\nslices: [{sources: [{model: a, layer_range: [2, 2]}]}]",
            ["slices.0.sources.0", "layer_range [2, 2]"],
        ),
        (
            "merge_method: slerp\nslices:\n"
            "- sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 3]}]",
            ["slices.0", "2, 3 layers"],
        ),
        (
            "merge_method: linear\nmodels: [{model: a}]\ntokenizer_source: base\ntokenizer: {source: base}",
            ["give one of them"],
        ),
        (
            "merge_method: linear\nmodules: {text: {models: [{model: a}]}, vision: {models: [{model: a}]}}",
            ["several parts (text, vision)"],
        ),
        ("merge_method: linear\nmodules: {text: {parameters: {}}}", ["modules.text", "either 'models' or 'slices'"]),
    ],
)
def test_unknown_keys_and_wrong_values_are_refused_with_their_place(
    tmp_path: Path, recipe: str, said: list[str]
) -> None:
    file = write_recipe(tmp_path, recipe)
    refused(lambda: parse_mergekit(read_yaml(file), file), str(file), *said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parameters": {"densty": 0.5}}, ["ties has no parameter 'densty' (parameters.densty)", "'density'"]),
        (
            {"models": [{"model": "a", "parameters": {"wieght": 1}}, {"model": "b"}]},
            ["'wieght' (models.0.parameters.wieght)", "did you mean 'weight'"],
        ),
        ({"parameters": {"density": 1.5}}, ["density", "less than or equal to 1"]),
        ({"parameters": {"weight": "much"}}, ["weight 'much'", "finite number"]),
        ({"parameters": {"weight": float("nan")}}, ["weight nan", "finite number"]),
        ({"merge_method": "tise"}, ["merge_method: no merge method 'tise'", "did you mean 'ties'"]),
        ({"merge_method": "ortho"}, ["one set of parameters", "basis merge --method ortho"]),
        ({"dtype": "float33"}, ["dtype: unknown dtype 'float33'", "did you mean 'float32'"]),
        ({"base_model": None}, ["ties needs a base"]),
        ({"merge_method": "linear", "parameters": {"weight": 0}}, ["the weights sum to zero", "normalize=false"]),
        ({"merge_method": "slerp", "parameters": {"t": 0.5}}, ["slerp merges 2 models, and 3 are given"]),
        ({"merge_method": "linear", "parameters": {"t": 1}}, ["linear has no parameter 't'"]),
    ],
)
def test_what_the_method_does_not_take_is_refused_and_nothing_is_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    basis: Callable[..., Result],
    changes: dict[str, Any],
    said: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_family(tmp_path)
    recipe = {
        "merge_method": "ties",
        "models": [{"model": "a"}, {"model": "b"}],
        "base_model": "base",
        "parameters": {"density": 0.5},
    }
    file = write_recipe(tmp_path, recipe | changes)
    before = sorted(tmp_path.iterdir())
    result = basis("run", file)
    assert result.exit_code == 3, result.output
    for part in [str(file), *said]:
        assert part in result.output, result.output
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a table of keys"),
        ("- merge_method: linear", "a table of keys"),
        ("just words", "a table of keys"),
        ("1: 2", "a table of keys"),
        ("a: [1", "not a recipe"),
        ("a: 1\n---\nb: 2", "one document a file"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: !!python/name:os.system x", "could not determine a constructor"),
        ("merge_method: linear\nmerge_method: ties", "line 2: the key 'merge_method' is given twice"),
        ("a: {b: 1, b: 2}", "the key 'b' is given twice"),
        ("a: &x [*x]", "line 1: an alias of what it is part of"),
        ("[" * 5000, "not a recipe"),
        ("a: 2024-99-99", "not a recipe"),
        ("a: \x00", "not a recipe"),
        ("#" * (1 << 21), "too large"),
        ("a: &a {? [1] : 2}\nb: {<<: *a}", "not a recipe"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str, said: str) -> None:
    file = write_recipe(tmp_path, text)
    refused(lambda: read_yaml(file), str(file), said)


@pytest.mark.parametrize("kind", ["lists", "merges"])
def test_aliases_of_aliases_do_not_fill_the_memory(tmp_path: Path, kind: str) -> None:
    lines = ["a0: &a0 {x: 1}"]
    for level in range(1, 30):
        inside = ", ".join([f"*a{level - 1}"] * 10)
        lines.append(f"a{level}: &a{level} " + (f"[{inside}]" if kind == "lists" else f"{{<<: [{inside}]}}"))
    refused(lambda: read_yaml(write_recipe(tmp_path, "\n".join(lines))), "aliases")


def test_bytes_that_are_no_text_a_folder_and_an_absent_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    refused(lambda: read_yaml(tmp_path / "bytes.yaml"), "not a recipe")
    refused(lambda: read_yaml(tmp_path), "cannot read the recipe")
    refused(lambda: read_yaml(tmp_path / "absent.yaml"), "cannot read the recipe", "No such file")


def test_anchors_are_read(tmp_path: Path) -> None:
    file = write_recipe(
        tmp_path, "merge_method: linear\nmodels: [{model: a, parameters: &p {weight: 1}}, {model: b, parameters: *p}]"
    )
    recipe = parse_mergekit(read_yaml(file), file)
    assert [one.parameters for one in recipe.models or []] == [{"weight": 1}, {"weight": 1}]


def test_keys_with_nothing_after_them_count_as_left_out(tmp_path: Path) -> None:
    file = write_recipe(tmp_path, "merge_method: linear\nmodels: [{model: a, parameters: }]\nparameters:\nslices:\n")
    assert parse_mergekit(read_yaml(file), file).parameters == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stages: []", ["neither a pipeline nor a merge of mergekit's: 'stages'", "did you mean 'steps'"]),
        ("base_model: a\nexperts: []", ["'base_model'", "docs/recipes.md"]),
        ("{}", ["neither"]),
        ("steps: []\nmodels: []", ["unknown key 'models'"]),
    ],
)
def test_a_file_in_neither_format_is_refused(tmp_path: Path, text: str, said: list[str]) -> None:
    refused(lambda: plan_run(write_recipe(tmp_path, text)), *said)


@pytest.mark.parametrize(
    ("written", "model", "lora"),
    [
        ("org/name", "org/name", None),
        ("org/name@v1", "org/name@v1", None),
        ("org/name@v1+org/lora@v2", "org/name@v1", "org/lora@v2"),
        ({"model": {"path": "org/name", "revision": "v1"}}, "org/name@v1", None),
        (
            {"model": {"path": "org/name"}, "lora": {"path": "org/lora", "revision": "v2"}},
            "org/name",
            "org/lora@v2",
        ),
        ("x" * 5000, "x" * 5000, None),
    ],
)
def test_models_are_named_as_in_mergekit(tmp_path: Path, written: object, model: str, lora: str | None) -> None:
    table = {"merge_method": "linear", "models": [{"model": written}]}
    (found,) = parse_mergekit(table, tmp_path / "recipe.yaml").names()
    assert (found.model, found.lora) == (model, lora)


def test_a_folder_with_a_plus_in_its_name_is_one_model(tmp_path: Path) -> None:
    (tmp_path / "a+b").mkdir()
    table = {"merge_method": "linear", "models": [{"model": str(tmp_path / "a+b")}]}
    (found,) = parse_mergekit(table, tmp_path / "recipe.yaml").names()
    assert found.lora is None


def test_the_revision_reaches_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_family(tmp_path)
    asked: list[tuple[str, str | None]] = []

    def pull(repo_id: str, revision: str | None = None) -> tuple[Path, str]:
        asked.append((repo_id, revision))
        return tmp_path / repo_id.partition("/")[2], "0123abc"

    monkeypatch.setattr("basiscli.hub.client.pull", pull)
    models = [{"model": "org/a@v1"}, {"model": "org/b"}]
    file = write_recipe(tmp_path, {"merge_method": "linear", "models": models})
    report = run(file, output=tmp_path / "out").merge.report  # type: ignore[union-attr]
    assert asked == [("org/a", "v1"), ("org/b", None)]
    assert [(one.repo_id, one.revision) for one in report.sources] == [("org/a", "0123abc"), ("org/b", "0123abc")]


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.y*ml")), ids=lambda file: file.name)
def test_the_examples_are_recipes(file: Path) -> None:
    table = read_yaml(file)
    assert read_steps(table, file) if "steps" in table else parse_mergekit(table, file)


def test_there_are_examples() -> None:
    assert len(list(EXAMPLES.glob("*.yaml"))) >= 4
