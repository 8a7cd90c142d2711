"""One real command of each kind, with whatever versions of torch, transformers, peft and numpy are installed.

`make test-versions` runs these with the oldest and with the newest, `make test` with the pinned ones. A deprecation
that a call of ours causes fails them, be it a Python warning or a line that transformers logs.
"""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

import basiscli
from basiscli import NolaConfig  # from here on PEFT knows it
from basiscli.app import app
from basiscli.checkpoints.kv_file import read_kv_bases
from basiscli.runtime.caches import cache_of, given_cache
from tests.conftest import basis_process
from tests.init_models import off, quiet_peft, with_peft
from tests.kv_models import llama, make_text, save_model, some_ids

pytestmark = [quiet_peft, pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")]
IDS = some_ids(count=2, length=20)
LENGTH = ("--length", "32")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base, the fine-tunes `a` and `b`, the adapters `lora-a` and `lora-b`, and a text."""
    here = tmp_path_factory.mktemp("versions")
    torch.manual_seed(0)
    base = llama(tie_word_embeddings=False)
    save_model(here / "base", base)
    (here / "text.txt").write_text(make_text(1500))
    for name in "ab":
        config = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", init_lora_weights=False)
        with torch.no_grad():
            tuned = get_peft_model(copy.deepcopy(base), config)
            tuned.peft_config["default"].base_model_name_or_path = str(here / "base")
            tuned.save_pretrained(here / f"lora-{name}")
            save_model(here / name, tuned.merge_and_unload())
    return here


@pytest.fixture(autouse=True)
def deprecations(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail a test in which transformers logs a deprecation; it says each only once, so what it said is forgotten."""
    logger = logging.getLogger("transformers")
    type(logger).warning_once.cache_clear()
    logger.addHandler(caplog.handler)
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()
    yield
    transformers_logging.set_verbosity(level)
    logger.removeHandler(caplog.handler)
    said = [one.getMessage() for phase in ("setup", "call") for one in caplog.get_records(phase)]
    assert [line for line in said if "deprecat" in line] == []


def basis(*words: str | Path) -> str:
    """Run a command, which must succeed; return what it prints."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stdout


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def dense(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("method", ["linear", "ortho"])
def test_merge(here: Path, tmp_path: Path, method: str) -> None:
    basis("merge", here / "a", here / "b", "--base", here / "base", "--method", method, "-o", tmp_path / "m")
    assert off(logits(dense(tmp_path / "m")), logits(dense(here / "base"))) > 1e-3
    assert "tensors" in basis("inspect", tmp_path / "m")
    assert "model.layers.0" in basis("diff", here / "base", tmp_path / "m")
    basis("verify", tmp_path / "m")
    basis("report", tmp_path / "m")


def test_merge_of_adapters_as_an_adapter(here: Path, tmp_path: Path) -> None:
    adapters = (here / "lora-a", here / "lora-b")
    basis("merge", *adapters, "--method", "ortho", "--as-adapter", "-o", tmp_path / "m")
    whole = basiscli.merge(list(adapters), method="ortho", output=tmp_path / "whole")
    assert off(logits(with_peft(here / "base", tmp_path / "m")), logits(dense(whole.path))) < 1e-4


@pytest.mark.parametrize("method", ["pissa", "eva", "corda", "svfit"])
def test_init(here: Path, tmp_path: Path, method: str) -> None:
    data = ["--calibration", here / "text.txt", *LENGTH] if method in ("eva", "corda") else []
    basis("init", here / "base", "--method", method, "--rank", "4", *data, "-o", tmp_path / "start")
    residual = tmp_path / "start" / "residual"
    pair = with_peft(residual if residual.exists() else here / "base", tmp_path / "start" / "adapter")
    assert off(logits(pair), logits(dense(here / "base"))) < 1e-4


def test_extract_and_expand(here: Path, tmp_path: Path) -> None:
    basis("extract", here / "a", "--base", here / "base", "--rank", "2", "-o", tmp_path / "lora")
    expected = logits(dense(here / "a"))
    assert off(logits(with_peft(here / "base", tmp_path / "lora")), expected) < 1e-4
    basis("expand", tmp_path / "lora", "--base", here / "base", "-o", tmp_path / "whole")
    assert off(logits(dense(tmp_path / "whole")), expected) < 1e-4


@pytest.mark.parametrize("steps", ["0", "3"])
def test_compress_load_generate_and_eval(here: Path, tmp_path: Path, steps: str) -> None:
    words = ("--kv-ratio", "0.5", "--train-steps", steps, "--calibration", here / "text.txt", *LENGTH)
    basis("compress", here / "base", *words, "-o", tmp_path / "kv")
    model, tokenizer = basiscli.load(tmp_path / "kv", device="cpu")
    with torch.no_grad():
        first = model(IDS[:, :12], use_cache=True)
        rest = model(IDS[:, 12:], use_cache=True, **given_cache(model, cache_of(first)))
    assert off(torch.cat([first.logits, rest.logits], 1), logits(model)) < 1e-4
    config = read_kv_bases(tmp_path / "kv").config
    widths = [(layer.keys.shape[-1], layer.values.shape[-1]) for layer in cache_of(rest).layers]
    assert widths == [(sum(k), sum(v)) for k, v in zip(config.key_ranks, config.value_ranks, strict=True)]
    prompt = tokenizer("the river ", return_tensors="pt")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(**prompt, **options, use_cache=False)
    assert torch.equal(model.generate(**prompt, **options), expected)
    assert torch.equal(model.generate(**prompt, **options, cache_implementation="static"), expected)
    own = given_cache(model, DynamicCache(config=model.config))
    assert torch.equal(model.generate(**prompt, **options, **own), expected)
    shown = basis(
        "eval", tmp_path / "kv", "--against", here / "base", "--text", here / "text.txt", *LENGTH, "--windows", "2",
        "--contexts", "40", "--new-tokens", "2", "--prefill", "compressed", "--device", "cpu", "--json",
    )  # fmt: skip
    assert json.loads(shown)["numbers"]["cache_kept"] == pytest.approx(0.5)


_ALONE = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("kv", trust_remote_code=True)
with torch.no_grad():
    out = model(input_ids=torch.arange(1, 9)[None], use_cache=True)
cache = out["cache"] if "cache" in out else out["past_key_values"]
print(type(model).__name__, *(layer.keys.shape[-1] for layer in cache.layers))
model.generate(torch.arange(1, 9)[None], max_new_tokens=4)
sys.exit("basiscli" in sys.modules)
"""


def test_remote_code_is_loaded_by_transformers_alone(here: Path, tmp_path: Path) -> None:
    words = ("--kv-ratio", "0.5", "--train-steps", "0", "--calibration", here / "text.txt", *LENGTH)
    basis("compress", here / "base", *words, "--export", "remote-code", "-o", tmp_path / "kv")
    ran = subprocess.run([sys.executable, "-c", _ALONE], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    widths = [sum(ranks) for ranks in read_kv_bases(tmp_path / "kv").config.key_ranks]
    assert ran.stdout.split() == ["BasisKVForCausalLM", *map(str, widths)]
    assert "deprecated" not in ran.stderr


def test_nola(here: Path, tmp_path: Path) -> None:
    basis("init", here / "base", "--method", "nola", "--rank", "2", "--bases", "16", "-o", tmp_path / "start")
    start = with_peft(here / "base", tmp_path / "start" / "adapter")
    assert isinstance(start.peft_config["default"], NolaConfig)
    assert off(logits(start), logits(dense(here / "base"))) < 1e-5
    basis(
        "compress", here / "lora-a", "--method", "nola", "--bases", "32", "--bits", "8", "--steps", "2", "--force",
        "--calibration", here / "text.txt", *LENGTH, "-o", tmp_path / "small",
    )  # fmt: skip
    basis("expand", tmp_path / "small", "-o", tmp_path / "plain")
    plain = with_peft(here / "base", tmp_path / "plain")
    assert off(logits(plain), logits(dense(here / "base"))) > 1e-3


def test_a_recipe(here: Path, tmp_path: Path) -> None:
    steps = [
        {"merge": [str(here / "a"), str(here / "b")], "name": "merged", "method": "linear"},
        {
            "compress": "merged", "name": "small", "kv_ratio": 0.5, "train_steps": 0, "length": 32,
            "calibration": str(here / "text.txt"),
        },
        {"eval": "small", "name": "check", "against": "merged", "text": str(here / "text.txt"), "length": 32},
    ]  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"steps": steps}))
    basis("run", tmp_path / "recipe.yaml", "-o", tmp_path / "made")
    assert (tmp_path / "made" / "check.json").is_file()


def test_the_command_itself(here: Path, tmp_path: Path) -> None:
    """In a process of its own, as a user meets it, nothing is said about what is deprecated."""
    assert "matryoshka" in basis_process("methods").stdout
    quick = ("--train-steps", "0", "--calibration", here / "text.txt", *LENGTH, "--quiet")
    done = basis_process("compress", here / "base", "--kv-ratio", "0.5", *quick, "-o", tmp_path / "kv")
    assert (done.returncode, done.stderr) == (0, "")
    words = ("--text", here / "text.txt", *LENGTH, "--windows", "2", "--contexts", "40", "--new-tokens", "2")
    done = basis_process("eval", tmp_path / "kv", *words)
    assert done.returncode == 0, done.stderr
    assert "deprecat" not in done.stderr
