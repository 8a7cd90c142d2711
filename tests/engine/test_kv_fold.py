"""Bases of the values in the weights: still the dense model, and the same compressed model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, OlmoConfig, OlmoForCausalLM

import basiscli
from basiscli.checkpoints.kv_file import read_kv_bases
from basiscli.checkpoints.views import Checkpoint
from basiscli.commands.kv.fold import Fold
from basiscli.commands.kv.shape import KVShape
from basiscli.errors import InputError
from basiscli.hub.resolve import resolve
from tests.conftest import read_checkpoint
from tests.kv_models import ARCHITECTURES, COMMON, logits_of, make_model, make_text, save_model, some_ids

IDS = some_ids(count=2, length=30)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(make_text(1500))
    return tmp_path / "text.txt"


def compress(model: Path, text: Path, out: str, ratio: float = 0.5, **options: Any) -> Path:
    given: dict[str, Any] = {"train_steps": 2, "length": 32, "search": "uniform"}
    return basiscli.compress(
        model, kv_ratio=ratio, calibration=text, output=model.with_name(out), **given | options
    ).path


def stock(folder: Path) -> Any:
    """Load as everybody does, without basis."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest difference relative to the largest logit."""
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_folding_changes_neither_the_dense_nor_the_compressed_model(name: str, tmp_path: Path, text: Path) -> None:
    model = save_model(tmp_path / "m", make_model(name))
    plain, folded = compress(model, text, "plain"), compress(model, text, "folded", fold_values=True)
    assert difference(logits_of(stock(folded), IDS), logits_of(stock(model), IDS)) < 1e-5
    before, after = read_checkpoint(model), read_checkpoint(folded)
    changed = {key.split("self_attn.")[1] for key in before if not torch.equal(before[key], after[key])}
    assert {key.partition(".")[0] for key in changed} <= {"v_proj", "qkv_proj", "o_proj"}
    assert len(changed) >= 2
    assert all(torch.equal(x, before[key]) for key, x in read_checkpoint(plain).items() if key in before)

    small, other = basiscli.load(folded, device="cpu")[0], basiscli.load(plain, device="cpu")[0]
    assert difference(logits_of(small, IDS), logits_of(other, IDS)) < 1e-4
    assert difference(logits_of(small, IDS), logits_of(stock(model), IDS)) > 1e-3  # it is compressed, after all
    a, b = (one.generate(IDS[:1, :10], max_new_tokens=12, do_sample=False) for one in (small, other))
    assert torch.equal(a, b)
    assert torch.equal(read_kv_bases(folded).bases, read_kv_bases(plain).bases)


@pytest.mark.parametrize("name", ["llama-gqa", "llama-bias", "phi3"])
@pytest.mark.parametrize("search", ["greedy", "spectrum"])
def test_a_folded_result_is_compressed_again_as_the_unfolded_one(
    name: str, search: str, tmp_path: Path, text: Path
) -> None:
    model = save_model(tmp_path / "m", make_model(name))
    plain, folded = compress(model, text, "plain"), compress(model, text, "folded", fold_values=True)
    again = compress(plain, text, "plain-again", 0.7, search=search)
    folded_again = compress(folded, text, "folded-again", 0.7, search=search)
    one, other = read_kv_bases(again), read_kv_bases(folded_again)
    assert one.config.key_ranks == other.config.key_ranks
    assert one.config.value_ranks == other.config.value_ranks
    assert torch.equal(one.bases, read_kv_bases(plain).bases)
    assert torch.equal(other.bases, one.bases)
    assert (one.config.values_folded, other.config.values_folded) == (False, True)
    small, second = (logits_of(basiscli.load(folder, device="cpu")[0], IDS) for folder in (again, folded_again))
    assert difference(small, second) < 1e-4
    weights = read_checkpoint(folded)
    assert all(torch.equal(x, weights[key]) for key, x in read_checkpoint(folded_again).items())


def test_an_unfolded_result_is_folded_when_it_is_compressed_again(tmp_path: Path, text: Path) -> None:
    model = save_model(tmp_path / "m", make_model())
    plain, folded = compress(model, text, "plain"), compress(model, text, "folded", fold_values=True)
    later = compress(plain, text, "later", fold_values=True)
    assert (later / "model.safetensors").read_bytes() == (folded / "model.safetensors").read_bytes()
    for file in ("kv_projection.safetensors", "kv_projection.json"):
        assert (later / file).read_bytes() == (folded / file).read_bytes()


def test_a_folded_model_at_full_rank_is_the_dense_model(tmp_path: Path, text: Path) -> None:
    model = save_model(tmp_path / "m", make_model())
    folded = compress(model, text, "folded", 0.0, fold_values=True)
    assert difference(logits_of(basiscli.load(folded, device="cpu")[0], IDS), logits_of(stock(model), IDS)) < 1e-5


def test_folded_weights_in_half_precision_are_rounded_once(tmp_path: Path, text: Path) -> None:
    model = save_model(tmp_path / "m", make_model().to(torch.bfloat16))
    folded = compress(model, text, "folded", fold_values=True)
    values = read_kv_bases(folded).bases[:, 1].double()
    before, after = read_checkpoint(model), read_checkpoint(folded)
    for layer in range(3):
        name = f"model.layers.{layer}.self_attn.v_proj.weight"
        heads = before[name].double().view(2, 16, 32)
        expected = (values[layer].mT @ heads).flatten(0, 1)
        assert torch.equal(after[name], expected.to(torch.bfloat16))


def test_a_sharded_checkpoint_is_folded_alike(tmp_path: Path, text: Path) -> None:
    model = save_model(tmp_path / "m", make_model())
    one = compress(model, text, "one", fold_values=True)
    many = compress(model, text, "many", fold_values=True, shard_size="20kB", workers=3)
    assert len(list(many.glob("model-*.safetensors"))) > 3
    whole, parts = (read_checkpoint(folder) for folder in (one, many))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(x, parts[key]) for key, x in whole.items())


# What cannot be folded ------------------------------------------------------------------------------------------------


def test_clipped_values_are_compressed_but_not_folded(tmp_path: Path, text: Path) -> None:
    config = OlmoConfig(**COMMON, clip_qkv=0.5)
    model = save_model(tmp_path / "m", OlmoForCausalLM(config).eval())
    compress(model, text, "plain")
    with pytest.raises(InputError, match="values are clipped after their projection") as caught:
        compress(model, text, "folded", fold_values=True, train_steps=10**9)  # refused before the training
    assert caught.value.remedy == "leave out --fold-v"
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["m", "plain", "text.txt"]


@pytest.mark.parametrize(("changed", "cause"), [("normalised", "values are normalised"), (None, "no such weight")])
def test_values_and_weights_that_cannot_be_folded(tmp_path: Path, changed: str | None, cause: str) -> None:
    checkpoint = Checkpoint.open(resolve(str(save_model(tmp_path / "m", make_model()))))
    fold = Fold(0, "model.layers.0.attention", KVShape(3, 2, 16), 2, fused=False, changed=changed)
    with pytest.raises(InputError, match=cause) as caught:
        fold.weights(checkpoint)
    assert caught.value.tensor == "model.layers.0.attention.v_proj.weight"
