"""`ortho` against the paper's sequential form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import basiscli
from tests.conftest import Tensors, add, make_tensors, read_checkpoint, write_checkpoint
from tests.plugins.reference_ortho import merge_step_by_step

LINEAR = {f"model.layers.0.{name}.weight" for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")}


def relative_error(found: Tensors, expected: Tensors, base: Tensors) -> float:
    """Return the largest error of any tensor's task vector, relative to its own length."""
    errors = []
    for name, tensor in expected.items():
        length = (tensor - base[name].double()).norm()
        if length > 0:
            errors.append(float((found[name].double() - tensor).norm() / length))
    return max(errors)


def make_family(folder: Path, count: int) -> tuple[Tensors, list[Tensors], list[Path]]:
    base = make_tensors(0)
    models = [add(base, make_tensors(seed), factor=0.3 + 0.1 * seed) for seed in range(1, count + 1)]
    write_checkpoint(folder / "base", base)
    return base, models, [write_checkpoint(folder / f"m{i}", model) for i, model in enumerate(models)]


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 0.8])
def test_five_models_equal_the_step_by_step_form(tmp_path: Path, alpha: float) -> None:
    base, models, folders = make_family(tmp_path, 5)
    result = basiscli.merge(
        folders, method="ortho", base=tmp_path / "base", parameters={"alpha": alpha}, output=tmp_path / "out"
    )
    expected, scale = merge_step_by_step(base, models, LINEAR, alpha)
    assert relative_error(read_checkpoint(result.path), expected, base) < 1e-5
    assert result.report.numbers["lambda"] == pytest.approx(scale, rel=1e-6)


def test_everything_is_closed_at_alpha_one(tmp_path: Path) -> None:
    base, models, folders = make_family(tmp_path, 3)
    result = basiscli.merge(
        folders, method="ortho", base=tmp_path / "base", parameters={"alpha": 1}, output=tmp_path / "out"
    )
    expected, _ = merge_step_by_step(base, models, LINEAR, 1.0)
    assert relative_error(read_checkpoint(result.path), expected, base) < 1e-5


def test_the_order_of_the_models_matters(tmp_path: Path) -> None:
    _, _, (a, b) = make_family(tmp_path, 2)
    forth = basiscli.merge([a, b], method="ortho", base=tmp_path / "base", output=tmp_path / "ab")
    back = basiscli.merge([b, a], method="ortho", base=tmp_path / "base", output=tmp_path / "ba")
    assert forth.report.weights_digest != back.report.weights_digest


def test_one_model_is_itself(tmp_path: Path) -> None:
    _, (model,), folders = make_family(tmp_path, 1)
    result = basiscli.merge(folders, method="ortho", base=tmp_path / "base", output=tmp_path / "out")
    for name, tensor in read_checkpoint(result.path).items():
        torch.testing.assert_close(tensor, model[name], rtol=1e-6, atol=1e-6)


def test_merging_the_base_with_itself_is_the_base(tmp_path: Path) -> None:
    base, _, _ = make_family(tmp_path, 1)
    folder = tmp_path / "base"
    result = basiscli.merge([folder, folder], method="ortho", base=folder, output=tmp_path / "out")
    assert all(torch.equal(tensor, base[name]) for name, tensor in read_checkpoint(result.path).items())


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_onto_continues_exactly(tmp_path: Path, alpha: float) -> None:
    base, _, folders = make_family(tmp_path, 4)
    options = {"method": "ortho", "base": tmp_path / "base", "parameters": {"alpha": alpha}}
    at_once = basiscli.merge(folders, output=tmp_path / "abcd", **options)
    two = basiscli.merge(folders[:2], output=tmp_path / "ab", **options)
    three = basiscli.merge(folders[2:3], onto=two.path, output=tmp_path / "ab+c", **options)
    four = basiscli.merge(folders[3:], onto=three.path, output=tmp_path / "ab+c+d", **options)
    expected = {name: tensor.double() for name, tensor in read_checkpoint(at_once.path).items()}
    assert relative_error(read_checkpoint(four.path), expected, base) < 1e-5
    assert four.report.numbers["lambda"] == pytest.approx(at_once.report.numbers["lambda"], rel=1e-6)
    assert four.report.numbers["models"] == 4


def test_the_merged_task_vector_has_the_mean_length(tmp_path: Path) -> None:
    base, models, folders = make_family(tmp_path, 3)
    result = basiscli.merge(folders, method="ortho", base=tmp_path / "base", output=tmp_path / "out")

    def length(model: Tensors) -> float:
        return float(torch.cat([(model[name] - base[name]).double().flatten() for name in base]).norm())

    mean = sum(map(length, models)) / 3
    assert length(read_checkpoint(result.path)) == pytest.approx(mean, rel=1e-5)
    record = result.report.task_vectors
    assert record is not None
    assert record.norms == pytest.approx([length(model) for model in models], rel=1e-5)
    assert record.merged_norm == pytest.approx(mean, rel=1e-5)


def test_a_tied_embedding_counts_once(tmp_path: Path) -> None:
    base, models, folders = make_family(tmp_path, 2)
    plain = basiscli.merge(folders, method="ortho", base=tmp_path / "base", output=tmp_path / "plain")
    for number, tensors in enumerate([base, *models]):
        twice = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
        write_checkpoint(tmp_path / f"tied{number}", twice)
    stored_twice = basiscli.merge(
        [tmp_path / "tied1", tmp_path / "tied2"], method="ortho", base=tmp_path / "tied0", output=tmp_path / "tied"
    )
    assert stored_twice.report.weights_digest == plain.report.weights_digest
    assert stored_twice.report.numbers["lambda"] == plain.report.numbers["lambda"]


def test_an_untied_head_is_a_linear_weight(tmp_path: Path) -> None:
    base, models, _ = make_family(tmp_path, 2)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
    generator = torch.Generator().manual_seed(5)
    for tensors in (base, *models):
        tensors["lm_head.weight"] = torch.randn(50, 24, generator=generator)
    folders = [write_checkpoint(tmp_path / f"u{i}", t, config) for i, t in enumerate([base, *models])]
    result = basiscli.merge(folders[1:], method="ortho", base=folders[0], output=tmp_path / "out")
    expected, _ = merge_step_by_step(base, models, LINEAR | {"lm_head.weight"}, 0.5)
    assert relative_error(read_checkpoint(result.path), expected, base) < 1e-5
    kinds = {tensor.name: tensor.kind for tensor in result.report.tensors}
    assert kinds["lm_head.weight"] == "linear"


def test_low_precision_checkpoints_are_merged_in_float32(tmp_path: Path) -> None:
    base, models, _ = make_family(tmp_path, 3)
    halves = [{name: t.to(torch.bfloat16) for name, t in tensors.items()} for tensors in (base, *models)]
    folders = [write_checkpoint(tmp_path / f"h{i}", tensors) for i, tensors in enumerate(halves)]
    result = basiscli.merge(folders[1:], method="ortho", base=folders[0], output=tmp_path / "out")
    expected, _ = merge_step_by_step(halves[0], halves[1:], LINEAR, 0.5)
    for name, tensor in read_checkpoint(result.path).items():
        assert tensor.dtype == torch.bfloat16
        # One rounding at the end: no further from the exact value than half a unit in the last place.
        limit = expected[name].abs() * 2**-8 + 1e-6
        assert bool(((tensor.double() - expected[name]).abs() <= limit).all())
