"""NOLA adapters at the command line: made, trained, stored in few bits, expanded, and read where adapters are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import Result

import basiscli
from basiscli import NolaConfig
from basiscli.checkpoints.packing import packed
from tests.conftest import snapshot
from tests.init_models import IDS, Make, answer, gpt2, llama, load, off, quiet_peft, save, with_peft

pytestmark = [quiet_peft, pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")]
Basis = Callable[..., Result]


def trained(model: Path, start: Path, out: Path) -> Tensor:
    """Train a start for some steps, save it and return the logits at the end."""
    tuned = with_peft(model, start, is_trainable=True).train()
    optimiser = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=0.05)
    for _ in range(8):
        tuned(input_ids=IDS, labels=IDS).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    tuned.eval().save_pretrained(out)
    return answer(tuned)


@pytest.fixture(params=[llama, gpt2])
def story(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, Tensor]:
    """Return a model, an adapter that began with `basis init` and was trained, and the logits of the two."""
    make: Make = request.param
    model = save(make, tmp_path / "model")
    options: dict[str, Any] = {"rank": 3, "alpha": 5, "parameters": {"bases": 20}, "seed": 11}
    start = basiscli.init(model, method="nola", output=tmp_path / "start", **options)
    assert torch.equal(answer(with_peft(model, start.adapter)), answer(load(model)))
    expected = trained(model, start.adapter, tmp_path / "trained")
    assert off(expected, answer(load(model))) > 1e-2
    return model, tmp_path / "trained", expected


def test_init_trained_saved_expanded_is_a_lora_for_stock_peft(story: tuple[Path, Path, Tensor], tmp_path: Path) -> None:
    model, adapter, expected = story
    done = basiscli.expand(adapter, output=tmp_path / "plain")
    assert done.kind == "adapter"
    config = json.loads((done.path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 5)
    assert off(answer(with_peft(model, done.path)), expected) < 1e-5
    whole = basiscli.expand(adapter, base=model, output=tmp_path / "whole")
    assert whole.kind == "checkpoint"
    assert off(answer(load(whole.path)), expected) < 1e-5


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_coefficients_in_few_bits_expand_to_what_peft_loads(
    bits: int, story: tuple[Path, Path, Tensor], tmp_path: Path
) -> None:
    model, adapter, _ = story
    file = adapter / "adapter_model.safetensors"
    small = {key: c.half() if bits == 16 else packed(c, bits) for key, c in load_file(file).items()}
    save_file(small, file)
    done = basiscli.expand(adapter, output=tmp_path / "plain")
    assert off(answer(with_peft(model, done.path)), answer(with_peft(model, adapter))) < 1e-5


def test_init_is_what_get_peft_model_makes(tmp_path: Path) -> None:
    model = save(llama, tmp_path / "model")
    made = basiscli.init(model, method="nola", rank=4, parameters={"bases": 30}, seed=3, output=tmp_path / "start")
    assert made.residual is None
    config = NolaConfig(r=4, num_bases=30, nola_alpha=4, seed=3, target_modules="all-linear")
    ours = {n: p for n, p in with_peft(model, made.adapter).named_parameters() if "nola_" in n}
    theirs = {n: p for n, p in get_peft_model(load(model), config).named_parameters() if "nola_" in n}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert made.report.numbers["adapter_parameters"] == sum(p.numel() for p in ours.values())


def test_nola_adapters_are_read_by_every_command(
    story: tuple[Path, Path, Tensor], tmp_path: Path, basis: Basis
) -> None:
    model, adapter, expected = story
    shutil.copytree(adapter, tmp_path / "again")
    before = snapshot(model, adapter)
    merged = basis(
        "merge", adapter, tmp_path / "again", "--method", "linear", "--base", model, "-o", tmp_path / "merged"
    )
    assert merged.exit_code == 0, merged.output
    assert off(answer(load(tmp_path / "merged")), expected) < 1e-5
    for words in (("inspect", adapter), ("verify", adapter), ("diff", model, adapter)):
        found = basis(*words)
        assert found.exit_code == 0, found.output
    assert snapshot(model, adapter) == before


@pytest.mark.parametrize("make", [llama, gpt2])
def test_interrupted_and_again_give_the_same_bytes(make: Make, tmp_path: Path) -> None:
    model = save(make, tmp_path / "model")
    files = []
    for workers in (1, 3):
        out = tmp_path / str(workers)
        basiscli.init(model, method="nola", rank=2, parameters={"bases": 9}, workers=workers, output=out)
        files.append((out / "adapter" / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("change", "word"),
    [({"features": {}}, "features"), ({"features": {"q_proj": [32, "a"]}}, "features"), ({"r": 0}, "r is 0"),
     ({"num_bases": "many"}, "num_bases"), ({"seed": None}, "seed"), ({"num_bases": 21}, "coefficients"),
     ({"features": {"q_proj": [1 << 40, 1 << 40]}}, "elements")],
)  # fmt: skip
def test_a_damaged_configuration_is_bad_input(change: dict[str, Any], word: str, tmp_path: Path, basis: Basis) -> None:
    model = save(llama, tmp_path / "model")
    made = basiscli.init(
        model, method="nola", rank=2, target_modules=["q_proj"], parameters={"bases": 20}, output=tmp_path / "start"
    )
    file = made.adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    found = basis("expand", made.adapter, "-o", tmp_path / "out")
    assert found.exit_code == 3, found.output
    assert word in found.output
    assert not list(tmp_path.glob("out*"))


def test_coefficients_that_are_no_numbers_or_missing_are_bad_input(tmp_path: Path, basis: Basis) -> None:
    model = save(llama, tmp_path / "model")
    made = basiscli.init(
        model, method="nola", rank=2, target_modules=["q_proj"], parameters={"bases": 20}, output=tmp_path / "start"
    )
    file = made.adapter / "adapter_model.safetensors"
    stored = load_file(file)
    first = next(iter(stored))
    for broken in (
        stored | {first: stored[first] / 0},
        {k: v for k, v in stored.items() if k != first},
        {"x": stored[first]},
    ):
        save_file(broken, file)
        found = basis("expand", made.adapter, "-o", tmp_path / "out")
        assert found.exit_code == 3, found.output
        assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("words", [("--bases", "0"), ("--bases", "x"), ("--bases", "8", "--quantize", "nf4")])
def test_bad_options_of_init(words: tuple[str, ...], tmp_path: Path, basis: Basis) -> None:
    model = save(llama, tmp_path / "model")
    found = basis("init", model, "--method", "nola", *words, "-o", tmp_path / "out")
    assert found.exit_code == 2, found.output
    assert not list(tmp_path.glob("out*"))
    found = basis("expand", model, "-o", tmp_path / "out")
    assert found.exit_code == 3


def test_from_the_command_line(tmp_path: Path, basis: Basis) -> None:
    model = save(llama, tmp_path / "model")
    found = basis("init", model, "--method", "nola", "--bases", 12, "--rank", 2, "-o", tmp_path / "out", "--json")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["numbers"]["adapter_parameters"] == 14 * 24
    done = basis("expand", tmp_path / "out" / "adapter", "-o", tmp_path / "lora")
    assert done.exit_code == 0, done.output
    assert isinstance(with_peft(model, tmp_path / "lora"), PeftModel)
    assert basis("expand", tmp_path / "out" / "adapter", "--initial", tmp_path / "lora").exit_code == 2
