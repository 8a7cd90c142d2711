"""The merge of two published fine-tunes of MiniLM."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import basiscli
from basiscli.commands.demo.api import SKILLS, SRE, demo, measure
from tests.conftest import read_checkpoint
from tests.plugins.reference_ortho import merge_step_by_step

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def merged(minilm: dict[str, Path], place: Path) -> basiscli.MergeResult:
    out = place / "merged"
    return basiscli.merge([minilm["sre"], minilm["jobs"]], method="ortho", base=minilm["base"], output=out)


def test_it_keeps_the_gain_of_both(merged: basiscli.MergeResult, minilm: dict[str, Path]) -> None:
    scores = {name: measure(folder) for name, folder in [*minilm.items(), ("merged", merged.path)]}
    for measured, expert in ((SRE, "sre"), (SKILLS, "jobs")):
        gain = scores[expert][measured] - scores["base"][measured]
        kept = scores["merged"][measured] - scores["base"][measured]
        assert gain > 0.3
        assert kept > 0.25 * gain, measured
    # Neither fine-tune does the other's work.
    assert scores["sre"][SKILLS] < scores["merged"][SKILLS]
    assert scores["jobs"][SRE] < scores["merged"][SRE]


def test_it_equals_the_step_by_step_form(merged: basiscli.MergeResult, minilm: dict[str, Path]) -> None:
    tensors = {name: read_checkpoint(folder) for name, folder in minilm.items()}
    del tensors["base"]["embeddings.position_ids"]
    linear = {t.name for t in merged.report.tensors if t.kind == "linear"}
    # One value matrix of this fine-tune has a singular value of 1e-7: zero, but for float32's rounding of the weights.
    noise = {
        name: 2**-24
        * float(tensors["base"][name].square().mean().sqrt())
        * sum(n**0.5 for n in tensors["base"][name].shape)
        for name in linear
    }
    expected, scale = merge_step_by_step(tensors["base"], [tensors["sre"], tensors["jobs"]], linear, 0.5, noise)
    found = read_checkpoint(merged.path)
    for name, tensor in expected.items():
        task_vector = tensor - tensors["base"][name].double()
        # The result is stored in float32, whose step is larger than 1e-5 of a task vector of 0.3 % of the weights.
        rounding = tensor.abs().max() * 2**-24 * tensor.numel() ** 0.5
        assert (found[name].double() - tensor).norm() <= 1e-5 * task_vector.norm() + rounding, name
    assert merged.report.numbers["lambda"] == pytest.approx(scale, rel=1e-5)


def test_the_buffer_that_the_fine_tunes_lack_comes_from_the_base(merged: basiscli.MergeResult) -> None:
    assert any("position_ids is missing in" in note for note in merged.report.notes)
    assert torch.equal(read_checkpoint(merged.path)["embeddings.position_ids"], torch.arange(512)[None])


def test_names_and_the_model_itself_agree_on_what_is_linear(
    merged: basiscli.MergeResult, minilm: dict[str, Path]
) -> None:
    model = AutoModel.from_pretrained(minilm["base"])
    modules = {f"{n}.weight" for n, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {t.name for t in merged.report.tensors if t.kind == "linear"} == modules


def test_it_loads_and_its_tokenizer_works(merged: basiscli.MergeResult) -> None:
    tokenizer = AutoTokenizer.from_pretrained(merged.path)
    assert tokenizer("merged models")["input_ids"][0] == tokenizer.cls_token_id
    AutoModel.from_pretrained(merged.path)
    assert (merged.path / "1_Pooling" / "config.json").is_file()  # a sentence-transformers model stays one


def test_the_cosine_of_the_two_task_vectors_is_what_it_is(merged: basiscli.MergeResult) -> None:
    record = merged.report.task_vectors
    assert record is not None
    assert record.cosines[0][1] == pytest.approx(0.002, abs=0.001)


def test_the_demo_does_what_it_says(minilm: dict[str, Path], tmp_path: Path) -> None:
    found = demo(tmp_path / "demo")
    assert set(found.scores) == {"base", "sre", "jobs", "merged"}
    assert basiscli.verify(found.path).checked_digests
