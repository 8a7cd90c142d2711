"""SmolLM2 with its three domain adapters."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import basiscli
from tests.conftest import basis_process

pytestmark = [
    pytest.mark.real,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft 0.21
]
HELD_OUT = Path(__file__).parents[2] / "examples" / "three-domains" / "held-out"


def perplexity(model: torch.nn.Module, folder: Path, domain: str, windows: int = 4) -> float:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (HELD_OUT / f"{domain}.txt").read_text()[:12_000]
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0][: windows * 256].view(windows, 256)
    with torch.inference_mode():
        return math.exp(float(model(input_ids=ids, labels=ids).loss))


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def merged(smollm2: Path, domains: dict[str, Path], place: Path) -> basiscli.MergeResult:
    out = place / "merged"
    return basiscli.merge(list(domains.values()), method="ortho", base=smollm2, output=out)


def test_in_factors_it_equals_the_merge_of_dense_checkpoints(
    smollm2: Path, domains: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """First, and without the models that it no longer needs, since its six would take more room than all the others."""
    folders = []
    for name, adapter in domains.items():
        whole = PeftModel.from_pretrained(load(smollm2), adapter).merge_and_unload()
        whole.save_pretrained(tmp_path / name)
        folders.append(tmp_path / name)
    dense = basiscli.merge(folders, method="ortho", base=smollm2, output=tmp_path / "dense")
    for folder in folders:
        shutil.rmtree(folder)
    merged: basiscli.MergeResult = request.getfixturevalue("merged")
    # A dense task vector carries the rounding of float32 weights, which the factors do not have; in its noise the
    # dense merge finds directions of its own.
    difference = basiscli.diff(merged.path, dense.path)
    record = merged.report.task_vectors
    assert record is not None
    distance = math.hypot(*(tensor.distance for tensor in difference.tensors))
    assert distance < 0.02 * record.merged_norm
    assert dense.report.numbers["lambda"] == pytest.approx(merged.report.numbers["lambda"], rel=1e-3)


def test_every_domain_is_better_than_with_the_base(
    merged: basiscli.MergeResult, smollm2: Path, domains: dict[str, Path]
) -> None:
    base, model = load(smollm2), load(merged.path)
    for domain in domains:
        assert perplexity(model, smollm2, domain) < perplexity(base, smollm2, domain), domain


def test_the_result_loads_generates_and_keeps_the_chat_template(merged: basiscli.MergeResult) -> None:
    tokenizer = AutoTokenizer.from_pretrained(merged.path)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Say hello."}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = load(merged.path).generate(**prompt, max_new_tokens=3, do_sample=False)
    assert out.shape[1] == prompt["input_ids"].shape[1] + 3


def test_as_an_adapter_it_loads_with_peft_and_gives_the_same_logits(
    merged: basiscli.MergeResult, smollm2: Path, domains: dict[str, Path], tmp_path: Path
) -> None:
    adapter = basiscli.merge(
        list(domains.values()), method="ortho", base=smollm2, as_adapter=True, output=tmp_path / "adapter"
    )
    assert sum(file.stat().st_size for file in adapter.path.iterdir()) < 12_000_000
    ids = torch.arange(100, 164)[None]
    with torch.inference_mode():
        found = PeftModel.from_pretrained(load(smollm2), adapter.path).eval()(ids).logits
        expected = load(merged.path)(ids).logits
        base = load(smollm2)(ids).logits
    # The adapter is stored in bfloat16, as its inputs are.
    assert (found - expected).norm() < 0.02 * (expected - base).norm()


def test_a_gguf_can_be_the_base(
    smollm2_gguf: Path, domains: dict[str, Path], merged: basiscli.MergeResult, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, smollm2: Path,
) -> None:  # fmt: skip
    monkeypatch.setenv("BASIS_CACHE", str(smollm2.parents[1]))  # where it was converted already
    result = basiscli.merge(list(domains.values()), method="ortho", base=smollm2_gguf, output=tmp_path / "out")
    assert result.report.weights_digest == merged.report.weights_digest


def test_peak_memory_does_not_grow_with_the_number_of_models(smollm2: Path, tmp_path: Path) -> None:
    peaks = {}
    for count in (2, 6):
        words = ["-m", "linear", "-o", tmp_path / f"out{count}", "--json", "--workers", "2"]
        done = basis_process("merge", *[smollm2] * count, *words, new=True)
        peaks[count] = json.loads(done.stdout)["cost"]["peak_memory_bytes"]
    assert peaks[6] < peaks[2] + 60_000_000  # 4 more models of 538 MB each
    assert peaks[2] < 700_000_000


def test_a_third_party_adapter_is_read(third_party_adapter: Path) -> None:
    found = basiscli.inspect(third_party_adapter)
    assert found.facts["base"] == "t5-large"
    assert found.facts["rank"] == 16
    assert found.facts["modules"] == 144
