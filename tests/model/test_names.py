"""What stored tensors are in the loaded model, held against transformers' own loading and PEFT's own placing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn
from typer.testing import Result

import basiscli
from basiscli.checkpoints.cache import cache_folder
from basiscli.checkpoints.views import Checkpoint
from basiscli.commands.init.targets import find_targets
from basiscli.hub.resolve import resolve
from basiscli.model.architecture import kinds
from basiscli.model.names import PLAIN, Part, _kind, loaded_names, names_say_everything, parts_of
from basiscli.transforms import Kind
from tests.model_zoo import INPUTS, TEXT, answer, deepseek, granite_moe, llava, nemotron, save, siglip, vit, vit_gpt2

Basis = Callable[..., Result]
Make = Callable[[], nn.Module]
KINDS = pytest.mark.parametrize("make", list(INPUTS), ids=lambda make: make.__name__)


def opened(folder: Path) -> Checkpoint:
    return Checkpoint.open(resolve(str(folder)))


def class_of(folder: Path) -> Any:
    return getattr(transformers, transformers.AutoConfig.from_pretrained(folder).architectures[0])


def with_adapter(model: Any, adapter: Path) -> Any:
    """Load an adapter with PEFT; what it says of its own ways is not ours, that it lacks keys would be."""
    with warnings.catch_warnings():
        for said in ("is_gradient_checkpointing", "fan_in_fan_out", "(rank|alpha)_pattern keys"):
            warnings.filterwarnings("ignore", f".*{said}")
        return peft.PeftModel.from_pretrained(model, adapter).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Make, Path]:
    home = tmp_path_factory.mktemp("zoo")
    return {make: save(make, home / make.__name__) for make in INPUTS}


@KINDS
def test_whole_tensors_are_the_loaded_models_parameters(folders: dict[Make, Path], make: Make) -> None:
    checkpoint = opened(folders[make])
    parts = parts_of(checkpoint)
    assert parts is not None
    state = class_of(folders[make]).from_pretrained(folders[make]).state_dict()
    whole = {name: part for name, part in parts.items() if part.is_whole}
    assert len(whole) > len(checkpoint.tensors) / 3
    for name, part in whole.items():
        assert torch.equal(state[part.parameter], checkpoint.read(name)), name
    assert {part.parameter for part in parts.values()} <= set(state)


@KINDS
def test_the_cached_answer_is_the_same(folders: dict[Make, Path], make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    first = parts_of(opened(folders[make]))
    monkeypatch.setattr("basiscli.model.names.meta_model", None)  # would fail if it was asked again
    assert parts_of(opened(folders[make])) == first


@KINDS
def test_residual_and_adapter_are_the_model(folders: dict[Make, Path], make: Make, tmp_path: Path) -> None:
    options = {"target_modules": "c_attn,q_proj"} if make is vit_gpt2 else {}
    made = basiscli.init(folders[make], method="pissa", rank=4, output=tmp_path / "out", **options)
    model_class = class_of(folders[make])
    expected = answer(make, model_class.from_pretrained(folders[make]).eval())
    residual = model_class.from_pretrained(made.residual).eval()
    assert (answer(make, residual) - expected).norm() / expected.norm() > 1e-3  # the factors matter
    found = answer(make, with_adapter(residual, made.adapter).base_model.model)
    assert (found - expected).norm() / expected.norm() < 1e-5


@KINDS
def test_extract_at_full_rank_is_the_fine_tune(folders: dict[Make, Path], make: Make, tmp_path: Path) -> None:
    tuned = save(make, tmp_path / "tuned", moved=0.01)
    made = basiscli.extract(tuned, base=folders[make], rank=4, exact=True, output=tmp_path / "lora")
    model = class_of(folders[make]).from_pretrained(folders[make])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    goal = class_of(folders[make]).from_pretrained(tuned).state_dict()
    merged = with_adapter(model, made.adapter).merge_and_unload().state_dict()
    checkpoint = opened(folders[make])
    parts = parts_of(checkpoint) or {}
    whole = [parts[n].parameter for n in find_targets(checkpoint, "all-linear") if parts[n].is_whole]
    changed = [name for name in whole if not torch.equal(merged[name], before[name])]
    assert len(changed) >= len(whole) / 2
    for name in changed:
        difference = (goal[name] - before[name]).double()
        difference = difference if parts_class(parts, name) != "Conv1D" else difference.T
        u, s, vh = torch.linalg.svd(difference, full_matrices=False)
        best = (u[:, :4] * s[:4]) @ vh[:4]
        found = (merged[name] - before[name]).double()
        found = found if parts_class(parts, name) != "Conv1D" else found.T
        assert (found - best).norm() / best.norm() < 1e-3, name


def parts_class(parts: Any, parameter: str) -> str:
    return next(part.module_class for part in parts.values() if part.parameter == parameter)


def test_routers_are_no_linear_layers_in_any_family(folders: dict[Make, Path]) -> None:
    for make, router in (
        (granite_moe, "router.layer.weight"),
        (deepseek, "mlp.gate.weight"),
        (nemotron, "gate.weight"),
    ):
        checkpoint = opened(folders[make])
        found = {n: k for n, k in kinds(checkpoint, checkpoint.tensors).by_name.items() if n.endswith(router)}
        assert found and set(found.values()) == {Kind.OTHER}
    checkpoint = opened(folders[nemotron])
    assert kinds(checkpoint, checkpoint.tensors).by_name["backbone.embeddings.weight"] is Kind.EMBEDDING


def test_what_reads_a_weight_without_its_module_is_no_target(folders: dict[Make, Path]) -> None:
    assert not any("head.attention.out_proj" in name for name in find_targets(opened(folders[siglip]), "all-linear"))
    assert not any("mixer.out_proj" in name for name in find_targets(opened(folders[nemotron]), "all-linear"))


def falcon() -> nn.Module:
    """Return a decoder whose layers are a subclass of `nn.Linear` with a `forward` of its own."""
    config = transformers.FalconConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    return transformers.FalconForCausalLM(config)


def test_a_linear_layer_with_a_forward_of_its_own_is_one(tmp_path: Path) -> None:
    folder = save(falcon, tmp_path / "m")
    made = basiscli.init(folder, method="pissa", rank=4, output=tmp_path / "out")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = transformers.FalconForCausalLM.from_pretrained(folder).eval()(ids).logits
        residual = transformers.FalconForCausalLM.from_pretrained(made.residual).eval()
        found = with_adapter(residual, made.adapter)(ids).logits
    assert (found - expected).norm() / expected.norm() < 1e-5


def test_a_linear_layer_that_returns_something_else_is_none() -> None:
    from transformers.models.llama4.modeling_llama4 import Llama4Router

    class Grouped(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(2, 3)

    config = transformers.Llama4TextConfig(hidden_size=8, num_local_experts=4, num_experts_per_tok=1)
    with torch.device("meta"):
        layers = [Llama4Router(config), Grouped(8, 4), nn.Linear(8, 4)]
    assert [_kind(layer, "weight") for layer in layers] == [Kind.OTHER, Kind.OTHER, Kind.LINEAR]


@pytest.mark.parametrize("content", ["[]", "5", '{"a": 5}', '{"a": null}', '{"a": {"modules": 5}}', "{"])
def test_a_damaged_cache_is_made_again(folders: dict[Make, Path], content: str) -> None:
    checkpoint = opened(folders[vit])
    expected = parts_of(checkpoint)
    file = max((cache_folder() / "names").glob("*/parts.json"), key=lambda file: file.stat().st_mtime_ns)
    text = file.read_text()
    file.write_text(content)
    assert parts_of(checkpoint) == expected and file.read_text() == text


def test_a_model_that_is_not_built_today_may_be_tomorrow(
    folders: dict[Make, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = opened(folders[llava])
    with monkeypatch.context() as patch:
        patch.setenv("BASIS_CACHE", str(tmp_path / "cache"))
        patch.setattr("basiscli.model.names.meta_model", lambda checkpoint: None)
        made = basiscli.init(folders[llava], method="pissa", rank=4, output=tmp_path / "out")
        assert any("transformers does not build this model" in note for note in made.report.notes)
        assert made.report.kinds_found_by == "names"
        patch.undo()
        patch.setenv("BASIS_CACHE", str(tmp_path / "cache"))
        assert parts_of(checkpoint) is not None
        made = basiscli.init(folders[llava], method="pissa", rank=4, output=tmp_path / "again")
        assert made.report.kinds_found_by == "model"


def test_what_peft_cannot_place_is_noted_or_refused_by_name(
    folders: dict[Make, Path], tmp_path: Path, basis: Basis
) -> None:
    made = basiscli.init(folders[deepseek], method="pissa", rank=4, output=tmp_path / "out")
    assert any("model.layers.0.mlp.down_proj" in note and "stay whole" in note for note in made.report.notes)
    words = ["init", folders[deepseek], "-m", "pissa", "-r", "4", "--target-modules", "gate_proj,up_proj,down_proj"]
    refused = basis(*words, "-o", tmp_path / "named")
    assert refused.exit_code == 2 and "model.layers.0.mlp." in refused.stderr and "--target-modules" in refused.stderr
    assert not (tmp_path / "named").exists() and not (tmp_path / "named.partial").exists()


def test_experts_of_a_stack_need_one_rank(folders: dict[Make, Path], tmp_path: Path, basis: Basis) -> None:
    tuned = save(deepseek, tmp_path / "tuned", moved=0.01)
    refused = basis("extract", tuned, "--base", folders[deepseek], "--energy", "0.9", "-o", tmp_path / "lora")
    assert refused.exit_code == 2 and "one rank" in refused.stderr
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("family", sorted(PLAIN))
def test_names_of_plain_families_are_the_loaded_models(tmp_path: Path, family: str) -> None:
    """For them transformers is not asked; it says the same."""
    config = transformers.AutoConfig.for_model(family, **TEXT)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    checkpoint = opened(tmp_path / "m")
    assert names_say_everything(checkpoint)
    parts = parts_of(checkpoint)
    assert parts is not None and set(parts) == set(checkpoint.tensors)
    named = kinds(checkpoint, checkpoint.tensors).by_name
    for name, part in parts.items():
        assert part.parameter == name and part.is_whole, name
        assert part.is_linear == (named[name] is Kind.LINEAR and name.endswith(".weight")), name


def test_a_model_that_transformers_does_not_build_goes_by_its_names(tmp_path: Path) -> None:
    folder = save(vit, tmp_path / "m")
    (folder / "config.json").write_text('{"architectures": ["NobodysModel"], "model_type": "nobody"}')
    checkpoint = opened(folder)
    assert parts_of(checkpoint) is None
    assert set(loaded_names(checkpoint, checkpoint.tensors).values()) == set(checkpoint.tensors)


def test_parts_are_plain_data() -> None:
    part = Part("a.weight", Kind.LINEAR, "Linear", True, True, ("a",))
    assert part.is_linear and not part.is_transposed
    assert not Part("a.weight", Kind.LINEAR, "Linear", True, True, ("a", "b")).is_linear  # two modules share it
    assert Part("a.weight", Kind.LINEAR, "Conv1D", True, True, ("a",)).is_transposed
    assert llava in INPUTS
