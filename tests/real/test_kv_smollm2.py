"""The KV cache of SmolLM2-135M-Instruct, compressed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import basiscli
from basiscli.checkpoints.kv_file import read_kv_bases
from basiscli.linalg.orthogonal import orthogonality_error
from basiscli.runtime.caches import cache_of, given_cache

pytestmark = pytest.mark.real
HELD_OUT = Path(__file__).parents[2] / "examples" / "three-domains" / "held-out"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a page of text: what is shown here needs no more."""
    file = tmp_path_factory.mktemp("text") / "page.txt"
    file.write_text("".join((HELD_OUT / f"{name}.txt").read_text()[:3500] for name in ("kjv", "python", "french")))
    return file


@pytest.fixture(scope="module")
def untrained(smollm2: Path, text: Path, place: Path) -> Path:
    """Return SmolLM2 with the quick path's bases, half of its cache removed."""
    out = place / "quick"
    return basiscli.compress(
        smollm2, kv_ratio=0.5, train_steps=0, search="spectrum", calibration=text, length=128, output=out
    ).path


def test_at_ratio_zero_it_is_the_dense_model(smollm2: Path, untrained: Path, tmp_path: Path) -> None:
    whole = basiscli.compress(untrained, kv_ratio=0, output=tmp_path / "whole")
    assert whole.report.numbers["cache_kept"] == 1.0
    dense, tokenizer = basiscli.load(smollm2, device="cpu")
    model, _ = basiscli.load(whole.path, device="cpu")
    ids = tokenizer((HELD_OUT / "kjv.txt").read_text()[:800], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected, got = dense(ids).logits, model(ids).logits
        cached = model(ids[:, 100:101], **given_cache(model, cache_of(model(ids[:, :100])))).logits
    largest = expected.abs().max()
    assert (expected - got).abs().max() / largest < 1e-5
    assert (expected[:, 100] - cached[:, 0]).abs().max() / largest < 1e-5


def test_the_cache_takes_what_the_ranks_say_and_generation_uses_it(untrained: Path) -> None:
    model, tokenizer = basiscli.load(untrained, device="cpu")
    ids = tokenizer("In the beginning God created the", return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    config = read_kv_bases(untrained).config
    cache = cache_of(out)
    for layer, keys, values in zip(cache.layers, config.key_ranks, config.value_ranks, strict=True):
        assert layer.keys.shape == (1, 1, ids.shape[1] + 11, sum(keys))
        assert layer.values.shape[-1] == sum(values)
    again = model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=False)
    assert torch.equal(out.sequences, again)


def test_a_few_steps_of_training_beat_none_and_another_ratio_keeps_the_bases(
    smollm2: Path, untrained: Path, text: Path, tmp_path: Path
) -> None:
    trained = basiscli.compress(
        smollm2, kv_ratio=0.6, train_steps=16, batch=1, length=128, search="uniform", output=tmp_path / "trained",
        parameters={"learning_rate": 0.004}, calibration=text,
    )  # fmt: skip
    assert trained.report.numbers["orthogonality_error"] < 1e-5
    quick = basiscli.compress(untrained, kv_ratio=0.6, search="uniform", output=tmp_path / "quick")
    found = {
        name: basiscli.evaluate(folder, text=HELD_OUT / "python.txt", against=smollm2, length=128, windows=4)
        for name, folder in (("trained", trained.path), ("quick", quick.path))
    }
    assert found["trained"].kl < 0.9 * found["quick"].kl
    assert found["trained"].numbers["cache_kept"] == pytest.approx(trained.report.numbers["cache_kept"])
    before, after = read_kv_bases(untrained), read_kv_bases(quick.path)
    assert torch.equal(before.bases, after.bases)
    assert orthogonality_error(after.bases) < 1e-5


def test_folded_values_give_the_same_model(untrained: Path, tmp_path: Path) -> None:
    options = {"kv_ratio": 0.5, "search": "spectrum", "output": tmp_path / "folded"}
    folded = basiscli.compress(untrained, fold_values=True, **options).path
    one = basiscli.evaluate(folded, text=HELD_OUT / "kjv.txt", against=untrained, length=128, windows=2)
    assert one.kl < 1e-6
    assert one.agreement == 1.0
