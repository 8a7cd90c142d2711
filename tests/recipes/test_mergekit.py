"""Merges in mergekit's format, against dense float64 computations written from the format's documentation."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import Result

from basiscli.commands.merge.run import MergeRun
from basiscli.commands.run.api import plan_run, run
from basiscli.commands.verify.api import verify
from tests.conftest import Tensors, basis_process, read_checkpoint, snapshot, write_checkpoint
from tests.recipes.models import CONFIG, LAYERS, config_of, layered, refused, write_family, write_recipe

HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merged(here: Path, recipe: Mapping[str, Any] | str, out: str = "out", **options: Any) -> Tensors:
    """Run a recipe in the current folder and return the result's tensors."""
    run(write_recipe(here, recipe), output=here / out, overwrite=True, **options)
    return read_checkpoint(here / out)


def assert_equal(found: Tensors, expected: Callable[[str], Tensor], names: Sequence[str] | None = None) -> None:
    for name in names or found:
        torch.testing.assert_close(found[name].double(), expected(name).double(), rtol=2e-6, atol=2e-6, msg=name)


def depth(name: str, layers: int = LAYERS) -> float:
    """Return a tensor's place on a gradient: 0 at the first layer, 1 at the last, 0 outside the layers."""
    return int(name.split(".")[2]) / (layers - 1) if ".layers." in name else 0.0


def along(steps: Sequence[float], place: float) -> float:
    """Return a gradient's value."""
    where = place * (len(steps) - 1)
    left = min(int(where), len(steps) - 2)
    return steps[left] + (where - left) * (steps[left + 1] - steps[left])


def slerp(t: float, x: Tensor, y: Tensor) -> Tensor:
    x, y = x.double(), y.double()
    angle = torch.arccos((x * y).sum() / (x.norm() * y.norm()))
    return (torch.sin((1 - t) * angle) * x + torch.sin(t * angle) * y) / torch.sin(angle)


def linear(models: Mapping[str, float]) -> dict[str, Any]:
    entries = [{"model": name, "parameters": {"weight": weight}} for name, weight in models.items()]
    return {"merge_method": "linear", "models": entries}


# Parameters by tensor and by model ------------------------------------------------------------------------------------


def test_weights_by_model_by_gradient_and_by_filter(here: Path) -> None:
    t = write_family(here)
    found = merged(
        here,
        """
        merge_method: task_arithmetic
        base_model: base
        models:
          - model: a
            parameters: {weight: [0, 0.3, 0.9]}
          - model: b
            parameters:
              weight: [{filter: mlp, value: 0.5}, {filter: norm, value: [1, 2]}]
        parameters:
          weight: 0.25
          lambda: [{filter: self_attn, value: 2}]
        """,
    )

    def expected(name: str) -> Tensor:
        base, a, b = (t[one][name].double() for one in ("base", "a", "b"))
        of_b = 0.5 if "mlp" in name else along([1, 2], depth(name)) if "norm" in name else 0.25
        scale = 2 if "self_attn" in name else 1
        return base + scale * (along([0, 0.3, 0.9], depth(name)) * (a - base) + of_b * (b - base))

    assert set(found) == set(t["base"])
    assert_equal(found, expected)


def test_densities_by_model_and_by_gradient(here: Path) -> None:
    t = write_family(here, "abc")
    found = merged(
        here,
        """
        merge_method: ties
        base_model: base
        models:
          - {model: a, parameters: {density: [1, 0.25], weight: 1}}
          - {model: b, parameters: {density: 0.5, weight: 2}}
          - {model: c, parameters: {weight: 0.5}}
        parameters: {density: {filter: mlp, value: 0.75}, normalize: true}
        """,
    )

    def expected(name: str) -> Tensor:
        base = t["base"][name].double()
        others = 0.75 if "mlp" in name else 1.0
        kept = []
        densities = (along([1, 0.25], depth(name)), 0.5, others)
        for model, density, weight in zip("abc", densities, (1, 2, 0.5), strict=True):
            delta = (t[model][name] - t["base"][name]).double()
            count = int(density * delta.numel())
            least = delta.abs().flatten().sort(descending=True).values[count - 1] if count else torch.inf
            kept.append((torch.where(delta.abs() >= least, delta, 0.0), weight))
        sign = torch.where(sum(w * d for d, w in kept) >= 0, 1.0, -1.0)  # type: ignore[arg-type]
        agreeing = [(torch.where(d.sign() == sign, d, 0.0), w) for d, w in kept]
        share: Tensor = sum(w * (d != 0) for d, w in agreeing)  # type: ignore[assignment]
        total: Tensor = sum(w * d for d, w in agreeing)  # type: ignore[assignment]
        return base + total / torch.where(share == 0, 1.0, share.double())

    assert_equal(found, expected)


def test_parameters_of_a_source_of_its_slice_of_the_module_and_of_the_recipe_in_that_order(here: Path) -> None:
    t = write_family(here)
    found = merged(
        here,
        """
        merge_method: linear
        modules:
          default:
            slices:
              - sources:
                  - {model: a, layer_range: [0, 2], parameters: {weight: [{filter: q_proj, value: 8}]}}
                  - {model: b, layer_range: [0, 2]}
                parameters: {weight: [{filter: up_proj, value: 4}]}
              - sources: [{model: a, layer_range: [2, 4]}, {model: b, layer_range: [2, 4]}]
            parameters: {weight: [{filter: embed, value: 2}]}
        parameters: {weight: 1, normalize: false}
        """,
    )
    first = {"q_proj": (8, 1), "up_proj": (4, 4), "layernorm": (1, 1), "embed": (2, 2)}

    def expected(name: str) -> Tensor:
        in_first = name == EMBEDDING or (".layers." in name and depth(name) < 0.5)
        x, y = next((w for part, w in first.items() if part in name and in_first), (1, 1))
        return x * t["a"][name].double() + y * t["b"][name].double()

    assert_equal(found, expected)


def test_filters_of_a_source_are_over_its_own_layers_and_those_of_the_recipe_over_the_results(here: Path) -> None:
    t = write_family(here)
    found = merged(
        here,
        """
        merge_method: linear
        slices:
          - sources:
              - {model: a, layer_range: [0, 2]}
              - {model: b, layer_range: [2, 4], parameters: {weight: [{filter: layers.3., value: 5}]}}
        parameters: {weight: 1, normalize: false}
        """,
    )
    assert config_of(here / "out")["num_hidden_layers"] == 2
    for layer, weight in ((0, 1), (1, 5)):
        name = "model.layers.{}.mlp.up_proj.weight"
        expected = t["a"][name.format(layer)] + weight * t["b"][name.format(layer + 2)]
        torch.testing.assert_close(found[name.format(layer)], expected, rtol=1e-6, atol=1e-6)


# Slices ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["a", "b"])
def test_slerp_with_gradients_begins_at_the_base_model(here: Path, base: str) -> None:
    t = write_family(here)
    found = merged(
        here,
        f"""
        merge_method: slerp
        base_model: {base}
        slices:
          - sources: [{{model: a, layer_range: [0, {LAYERS}]}}, {{model: b, layer_range: [0, {LAYERS}]}}]
        parameters:
          t:
            - {{filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}}
            - {{filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}}
            - {{value: 0.25}}
        """,
    )
    first, second = base, "b" if base == "a" else "a"

    def expected(name: str) -> Tensor:
        t_of = {"self_attn": [0, 0.5, 0.3, 0.7, 1], "mlp": [1, 0.5, 0.7, 0.3, 0]}
        share = next((along(steps, depth(name)) for part, steps in t_of.items() if part in name), 0.25)
        return slerp(share, t[first][name], t[second][name])

    assert_equal(found, expected)


def test_passthrough_makes_a_deeper_model(here: Path) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    t = write_family(here, layer_types=kinds)
    recipe = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "a", "layer_range": [0, 3]}]},
            {"sources": [{"model": "b", "layer_range": [1, 4]}]},
        ],
    }
    found = merged(here, recipe)
    config = config_of(here / "out")
    assert config["num_hidden_layers"] == 6
    assert config["layer_types"] == [*kinds[:3], *kinds[1:4]]
    assert torch.equal(found[EMBEDDING], t["a"][EMBEDDING])
    assert torch.equal(found[NORM], t["b"][NORM])
    assert torch.equal(found[HEAD], t["b"][HEAD])
    origin = [("a", 0), ("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b", 3)]
    layers = {name.split(".")[2] for name in found if ".layers." in name}
    assert layers == {str(number) for number in range(6)}
    for number, (model, layer) in enumerate(origin):
        name = "model.layers.{}.self_attn.q_proj.weight"
        assert torch.equal(found[name.format(number)], t[model][name.format(layer)])
    assert verify(here / "out").tensors == len(found)


def test_a_list_that_one_model_lacks_is_left_to_the_class(here: Path) -> None:
    write_family(here, layer_types=["full_attention"] * 4)
    (here / "b" / "config.json").write_text(json.dumps(CONFIG))
    slices = [{"sources": [{"model": name, "layer_range": [0, 4]}]} for name in "ab"]
    merged(here, {"merge_method": "passthrough", "slices": slices})
    assert config_of(here / "out")["layer_types"] is None


def test_a_head_that_is_called_embed_out_comes_after_the_layers(here: Path) -> None:
    tensors = {}
    for seed, name in enumerate("ab"):
        one = layered(seed)
        one["embed_out.weight"] = one.pop(HEAD)
        write_checkpoint(here / name, one, CONFIG)
        tensors[name] = one
    slices = [{"sources": [{"model": name, "layer_range": [0, 2]}]} for name in "ab"]
    found = merged(here, {"merge_method": "passthrough", "slices": slices})
    assert torch.equal(found["embed_out.weight"], tensors["b"]["embed_out.weight"])


def test_scale_of_one_kind_of_tensors_in_a_passthrough(here: Path) -> None:
    t = write_family(here)
    found = merged(
        here,
        {
            "merge_method": "passthrough",
            "slices": [{"sources": [{"model": "a", "layer_range": [0, 4]}]}],
            "parameters": {"scale": [{"filter": "up_proj", "value": 0.0}, {"value": 1.0}]},
        },
    )
    assert_equal(found, lambda name: t["a"][name] * (0 if "up_proj" in name else 1))


def test_task_vectors_in_slices(here: Path) -> None:
    t = write_family(here)
    sources = [{"model": name, "layer_range": [0, 4]} for name in ("b", "base", "a")]
    recipe = {"merge_method": "task_arithmetic", "base_model": "base", "slices": [{"sources": sources}]}
    found = merged(here, recipe)
    assert_equal(found, lambda name: t["a"][name].double() + t["b"][name].double() - t["base"][name].double())


def test_slices_that_do_not_fit_are_refused(here: Path) -> None:
    write_family(here)

    def one(method: str, names: str, last: int) -> Path:
        sources = [{"model": name, "layer_range": [0, last]} for name in names]
        slices = [{"sources": sources}, {"sources": [*sources, {"model": "base", "layer_range": [0, last]}]}]
        recipe = {"merge_method": method, "base_model": "base", "slices": slices[: 2 if method == "sce" else 1]}
        return write_recipe(here, recipe)

    refused(lambda: plan_run(one("linear", "ab", 5)), "layers 0 to 5 of a model of 4 layers", "within [0, 4]")
    refused(lambda: plan_run(one("ties", "ab", 4)), "slices.0: the base base is not in it", "among the sources")
    refused(lambda: plan_run(one("sce", "ab", 4)), "slices.0: the base base is not in it", "among the sources")


def test_slices_of_different_numbers_of_models_are_refused(here: Path) -> None:
    write_family(here)
    one, two = ({"sources": [{"model": name, "layer_range": [0, 2]} for name in names]} for names in ("a", "ab"))
    refused(
        lambda: plan_run(write_recipe(here, {"merge_method": "linear", "slices": [one, two]})),
        "slices of 1, 2 models",
        "weight 0",
    )


# The base -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("listed", [True, False])
def test_a_base_is_no_model_of_a_merge_of_task_vectors(here: Path, listed: bool) -> None:
    t = write_family(here)
    models = [{"model": name} for name in (["base", "a", "b"] if listed else ["a", "b"])]
    found = merged(here, {"merge_method": "task_arithmetic", "base_model": "base", "models": models})
    assert_equal(found, lambda name: t["a"][name].double() + t["b"][name].double() - t["base"][name].double())


@pytest.mark.parametrize("method", ["slerp", "nearswap", "arcee_fusion"])
def test_of_two_models_the_base_is_the_first_listed_or_not(here: Path, method: str) -> None:
    write_family(here)
    parameters = {} if method == "arcee_fusion" else {"t": 0.2}
    recipe = {"merge_method": method, "base_model": "a", "parameters": parameters}
    last, first, left_out = (
        merged(here, recipe | {"models": [{"model": name} for name in names]}, out=f"out-{names}")
        for names in ("ba", "ab", "b")
    )
    swapped = merged(here, recipe | {"base_model": "b", "models": [{"model": "a"}, {"model": "b"}]})
    assert all(torch.equal(last[name], first[name]) and torch.equal(last[name], left_out[name]) for name in first)
    assert any(not torch.equal(swapped[name], first[name]) for name in first)


@pytest.mark.parametrize("method", ["linear", "karcher"])
def test_a_base_without_a_use_is_ignored_unless_listed(here: Path, method: str) -> None:
    write_family(here)
    models = [{"model": "a"}, {"model": "b"}]
    without = merged(here, {"merge_method": method, "models": models})
    with_base = merged(here, {"merge_method": method, "models": models, "base_model": "base"}, out="with")
    listed = {"merge_method": method, "models": [*models, {"model": "base"}], "base_model": "base"}
    assert all(torch.equal(without[name], with_base[name]) for name in without)
    assert any(not torch.equal(without[name], other) for name, other in merged(here, listed).items())


def test_a_method_that_can_do_without_a_base_takes_one(here: Path) -> None:
    write_family(here)
    models = [{"model": "a"}, {"model": "b"}]
    without = merged(here, {"merge_method": "nuslerp", "models": models})
    with_base = merged(here, {"merge_method": "nuslerp", "models": models, "base_model": "base"}, out="with")
    assert any(not torch.equal(without[name], with_base[name]) for name in without)


# Adapters -------------------------------------------------------------------------------------------------------------


def write_adapter(folder: Path, seed: int = 5) -> Callable[[str], Tensor]:
    """Write a PEFT adapter of rank 2 on the attention; return ΔW by the weight's name, in float64."""
    generator = torch.Generator().manual_seed(seed)
    factors: Tensors = {}
    for layer in range(LAYERS):
        module = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        factors[f"{module}.lora_A.weight"] = torch.randn(2, 8, generator=generator)
        factors[f"{module}.lora_B.weight"] = torch.randn(8, 2, generator=generator)
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))

    def delta(name: str) -> Tensor:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" not in factors:
            return torch.zeros(()).double()
        return 3 * factors[f"{module}.lora_B.weight"].double() @ factors[f"{module}.lora_A.weight"].double()

    return delta


def test_a_model_with_an_adapter_on_it(here: Path) -> None:
    t = write_family(here)
    delta = write_adapter(here / "lora")
    found = merged(here, linear({"a+lora": 1, "b": 3}))
    assert_equal(found, lambda name: (t["a"][name].double() + delta(name) + 3 * t["b"][name].double()) / 4)


@pytest.mark.parametrize("under", ["base", "b"])
def test_an_adapter_is_on_the_model_before_the_plus_and_not_on_the_base_of_the_merge(here: Path, under: str) -> None:
    t = write_family(here)
    delta = write_adapter(here / "lora")
    models = [{"model": f"{under}+lora"}, {"model": "a"}]
    found = merged(here, {"merge_method": "task_arithmetic", "base_model": "base", "models": models})

    def expected(name: str) -> Tensor:
        return t[under][name].double() + delta(name) + t["a"][name].double() - t["base"][name].double()

    assert_equal(found, expected)
    sources = json.loads((here / "out" / "basis_report.json").read_text())["sources"]
    assert {Path(one["spec"]).name for one in sources} == {"a", "base", under, "lora"}


def test_adapters_where_they_cannot_be_are_refused(here: Path) -> None:
    write_family(here)
    write_adapter(here / "lora")
    ties = {"merge_method": "ties", "models": [{"model": "a"}, {"model": "b"}]}
    cases: list[tuple[dict[str, Any], list[str]]] = [
        (ties | {"base_model": "base+lora"}, ["the base is an adapter on base", "basis expand"]),
        (ties | {"base_model": "lora"}, ["lora is an adapter", "BASE+lora"]),
        (linear({"a+b": 1, "b": 1}), ["b"]),
        (
            {"merge_method": "passthrough", "slices": [{"sources": [{"model": "a+lora", "layer_range": [0, 2]}]}]},
            ["a+lora is no plain checkpoint", "basis expand"],
        ),
    ]
    for recipe, said in cases:
        refused(lambda recipe=recipe: plan_run(write_recipe(here, recipe)), *said)  # type: ignore[misc]


# Dtypes, and what the result says -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "option", "dtype"),
    [
        ({}, None, torch.float32),
        ({"dtype": "bfloat16"}, None, torch.bfloat16),
        ({"dtype": "float32", "out_dtype": "float16"}, None, torch.float16),
        ({"dtype": "bfloat16"}, "float16", torch.float16),
    ],
)
def test_the_dtype_is_that_of_the_storage_and_the_arithmetic_is_float32(
    here: Path, keys: dict[str, str], option: str | None, dtype: torch.dtype
) -> None:
    t = write_family(here)
    found = merged(here, linear({"a": 1, "b": 2}) | keys, dtype=option)
    expected = {name: ((t["a"][name].double() + 2 * t["b"][name].double()) / 3).to(dtype) for name in found}
    for name, tensor in found.items():
        assert tensor.dtype == dtype
        torch.testing.assert_close(tensor.double(), expected[name].double(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    reproduce = json.loads((here / "out" / "basis_report.json").read_text())["reproduce"]
    assert reproduce == "basis run recipe.yaml" + (" --dtype f16" if option else "")
    if keys or option:
        assert config_of(here / "out")["dtype"] == str(dtype).removeprefix("torch.")


def test_report_card_and_recipe_are_in_the_result_and_the_command_makes_the_same_bytes(here: Path) -> None:
    write_family(here)
    text = """
# a comment that stays
merge_method: slerp
base_model: a
models: [{model: a}, {model: ./b}]
parameters: {t: [0, 1], int8_mask: true}
"""
    write_recipe(here, text, "first.yaml")
    result = basis_process("run", "first.yaml", cwd=here)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()) == here / "first"
    assert "int8_mask has no effect" in result.stderr
    assert (here / "first" / "recipe.yaml").read_text() == text
    report = json.loads((here / "first" / "basis_report.json").read_text())
    assert report["method"] == {
        "name": "slerp",
        "parameters": {"t": "recipe.yaml"},
        "source": report["method"]["source"],
    }
    assert [one["spec"] for one in report["sources"]] == ["a", "./b"]
    assert all(one["digest"] for one in report["sources"])
    assert report["continuation"] is None
    assert report["reproduce"] == "basis run recipe.yaml"
    assert "basis run recipe.yaml" in (here / "first" / "README.md").read_text()

    (here / "recipe.yaml").write_bytes((here / "first" / "recipe.yaml").read_bytes())
    again = basis_process(*report["reproduce"].split()[1:], cwd=here, new=True)
    assert again.returncode == 0, again.stderr
    assert (here / "recipe" / "model.safetensors").read_bytes() == (here / "first" / "model.safetensors").read_bytes()
    assert verify(here / "recipe").checked_digests


def test_one_value_for_all_tensors_is_in_the_report(here: Path) -> None:
    write_family(here)
    recipe = {"merge_method": "slerp", "models": [{"model": "a"}, {"model": "b"}], "parameters": {"t": 0.25}}
    merged(here, recipe)
    assert json.loads((here / "out" / "basis_report.json").read_text())["method"]["parameters"] == {"t": 0.25}


def test_the_same_bytes_for_any_number_of_workers_and_size_of_shards(here: Path) -> None:
    write_family(here)
    recipe = {
        "merge_method": "dare_ties",
        "base_model": "base",
        "models": [{"model": "a", "parameters": {"density": [0.2, 0.9]}}, {"model": "b"}],
        "parameters": {"density": 0.5},
    }
    one = merged(here, recipe, workers=1, seed=3)
    four = merged(here, recipe, workers=4, seed=3, shard_size="1kB")
    other = merged(here, recipe, seed=4)
    assert all(torch.equal(one[name], four[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert "--seed 4" in json.loads((here / "out" / "basis_report.json").read_text())["reproduce"]


def test_an_interrupted_run_goes_on_and_a_changed_recipe_begins_again(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_family(here)
    recipe = linear({"a": 1, "b": 2})
    whole = merged(here, recipe, out="whole")
    merge, done = MergeRun._merge_elements, list[str]()

    def stopping(self: MergeRun, name: str) -> dict[str, Any]:
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(name)
        return merge(self, name)

    monkeypatch.setattr(MergeRun, "_merge_elements", stopping)
    with pytest.raises(KeyboardInterrupt):
        merged(here, recipe, workers=1)
    assert not (here / "out").exists()

    def counting(self: MergeRun, name: str) -> dict[str, Any]:
        done.append(name)
        return merge(self, name)

    monkeypatch.setattr(MergeRun, "_merge_elements", counting)
    found = merged(here, recipe, workers=1)
    assert len(done) == len(whole) == len(set(done))
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_other_weights_are_another_merge_and_nothing_of_the_interrupted_one_stays(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_family(here)
    merge, done = MergeRun._merge_elements, list[str]()

    def stopping(self: MergeRun, name: str) -> dict[str, Any]:
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(name)
        return merge(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(MergeRun, "_merge_elements", stopping)
        with pytest.raises(KeyboardInterrupt):
            merged(here, linear({"a": 1, "b": 2}), workers=1)
    gradient = linear({"a": 1, "b": 2})
    gradient["models"][1]["parameters"]["weight"] = [2, 3]  # the same for the first tensor
    found, fresh = merged(here, gradient), merged(here, gradient, out="fresh")
    assert all(torch.equal(found[name], fresh[name]) for name in fresh)


def test_a_dry_run_writes_nothing_and_inputs_stay(here: Path, basis: Callable[..., Result]) -> None:
    write_family(here)
    file = write_recipe(here, linear({"a": 1, "b": 2}) | {"parameters": {"normalize": [{"value": True}]}})
    before = snapshot(here)
    result = basis("run", file, "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert len(plan["tensors"]) == len(layered(0))
    assert plan["parameters"] == {"normalize": True}
    assert snapshot(here) == before


def test_gates_of_the_command_line_are_over_the_merges_numbers(here: Path, basis: Callable[..., Result]) -> None:
    write_family(here)
    file = write_recipe(here, linear({"a": 1, "b": 2}))
    assert basis("run", file, "-o", here / "out", "--fail-if", "tensors > 3").exit_code == 4
    assert basis("run", file, "-o", here / "other", "--fail-if", "tensors < 3").exit_code == 0


def test_a_merge_refuses_to_write_over_an_input(here: Path) -> None:
    write_family(here)
    result = basis_process("run", str(write_recipe(here, linear({"a": 1, "b": 2}), "a.yaml")), "--overwrite", cwd=here)
    assert result.returncode == 2
    assert "inside an input" in result.stderr


def test_models_of_different_depths_are_refused_with_the_tensors_name(here: Path) -> None:
    write_family(here)
    write_checkpoint(here / "deep", layered(7, layers=5), CONFIG | {"num_hidden_layers": 5})
    refused(lambda: plan_run(write_recipe(here, linear({"a": 1, "deep": 1}))), "has a parameter", "model.layers.4")
    refused(lambda: plan_run(write_recipe(here, linear({"deep": 1, "a": 1}))), "a lacks a parameter", "model.layers.4")
