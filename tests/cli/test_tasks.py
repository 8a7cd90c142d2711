"""`basis eval --tasks`: scores of lm-evaluation-harness, of models as basis loads them."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import Result

import basiscli
from basiscli.errors import UsageError
from basiscli.reports.numbers import is_documented
from tests.kv_models import byte_tokenizer, make_model, make_text, save_model

Basis = Callable[..., Result]
DOCS: list[dict[str, Any]] = [
    {
        "question": make_text(24, n).strip(),  # the harness moves spaces at the end, and Jinja drops a last newline
        "choices": [make_text(6, 100 * n + k).strip() for k in range(4)],
        "answer": n % 4,
    }
    for n in range(12)
]
CHOICE = """
task: river-choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
COMPLETION = """
task: river_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
metric_list: [{{metric: perplexity}}]
"""
harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra `eval`")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, the same with a small cache, and two tasks."""
    place = tmp_path_factory.mktemp("tasks")
    save_model(place / "m", make_model())
    (place / "text.txt").write_text(make_text(1500))
    (place / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    (place / "own").mkdir()
    for name, text in (("choice", CHOICE), ("completion", COMPLETION)):
        (place / "own" / f"{name}.yaml").write_text(text.format(data=place / "docs.jsonl", cache=place / "cache"))
    basiscli.compress(
        place / "m", kv_ratio=0.5, train_steps=0, calibration=place / "text.txt", length=32, output=place / "kv",
        device="cpu",
    )  # fmt: skip
    return place


def log_likelihood(model: Any, context: str, rest: str) -> float:
    """Return log p(rest | context), token by token in float64."""
    ids = byte_tokenizer()(context + rest, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        log = model(input_ids=ids).logits[0].double().log_softmax(-1)
    return sum(float(log[n - 1, ids[0, n]]) for n in range(len(context), ids.shape[1]))


def expected(folder: Path) -> dict[str, float]:
    model, _ = basiscli.load(folder, device="cpu")
    right, total = 0, 0.0
    for doc in DOCS:
        every = [log_likelihood(model, doc["question"], f" {choice}") for choice in doc["choices"]]
        right += every.index(max(every)) == doc["answer"]
        total += log_likelihood(model, doc["question"], doc["choices"][0])  # only choices get a space before them
    return {"task_river_choice_acc": right / len(DOCS), "task_river_text_perplexity": math.exp(-total / len(DOCS))}


@harness
def test_scores_are_those_of_both_models_with_their_caches(place: Path, basis: Basis) -> None:
    shown = basis(
        "eval", place / "kv", "--against", place / "m", "--text", place / "text.txt", "--length", "32", "--windows",
        "2", "--device", "cpu", "--tasks", "river-choice, river_text", "--task-path", place / "own", "--json",
        "--fail-if", "task_river_choice_acc < 0", "--fail-if", "task_river_text_perplexity_change != 0",
    )  # fmt: skip
    assert shown.exit_code == 4, shown.stderr  # the second gate: the small cache is what is measured
    found = json.loads(shown.stdout)
    assert [one["failed"] for one in found["gates"]] == [False, True]
    numbers, dense = expected(place / "kv"), expected(place / "m")
    assert numbers["task_river_text_perplexity"] != pytest.approx(dense["task_river_text_perplexity"], rel=1e-3)
    numbers |= {f"{name}_change": value - dense[name] for name, value in numbers.items()}
    assert {name: found["numbers"][name] for name in numbers} == pytest.approx(numbers, rel=1e-4)
    assert found["numbers"]["task_river_choice_acc_stderr"] > 0
    assert {name for name in found["numbers"] if not is_documented(name)} == set()
    assert [one["task"] for one in found["against"]["tasks"]] == ["river-choice", "river_text"]
    assert found["against"]["tasks"][1]["value"] == pytest.approx(dense["task_river_text_perplexity"], rel=1e-4)


@harness
def test_a_limit_takes_the_first_examples_and_people_see_a_row(place: Path, basis: Basis) -> None:
    shown = basis(
        "eval", place / "m", "--text", place / "text.txt", "--length", "32", "--windows", "1", "--device", "cpu",
        "--tasks", "river_text", "--task-path", place / "own", "--task-limit", "1", "--few-shot", "0",
    )  # fmt: skip
    assert shown.exit_code == 0, shown.stderr
    model, _ = basiscli.load(place / "m", device="cpu")
    one = math.exp(-log_likelihood(model, DOCS[0]["question"], DOCS[0]["choices"][0]))
    row = next(line for line in shown.stdout.splitlines() if line.startswith("river_text, perplexity"))
    assert float(row.split()[-1]) == pytest.approx(one, rel=1e-4)


@harness
def test_unknown_tasks_and_data_that_is_not_there_are_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"river_txt.*\n.*did you mean 'river_text'"):
        basiscli.evaluate(tmp_path / "absent", tasks=["river_txt"], task_path=place / "own")
    (tmp_path / "lost.yaml").write_text(COMPLETION.format(data=tmp_path / "absent.jsonl", cache=tmp_path / "cache"))
    with pytest.raises(basiscli.InputError, match="task 'river_text': "):
        basiscli.evaluate(tmp_path / "absent", tasks=["river_text"], task_path=tmp_path)
    (tmp_path / "lost.yaml").write_text(
        COMPLETION.format(data=place / "docs.jsonl", cache=tmp_path / "cache").replace("question", "qestion")
    )
    with pytest.raises(basiscli.InputError, match=r"task 'river_text': .*qestion"):
        basiscli.evaluate(
            place / "m", text=place / "text.txt", length=32, windows=1, tasks=["river_text"], task_path=tmp_path
        )


def test_without_the_harness_the_extra_is_named_before_any_work(
    tmp_path: Path, basis: Basis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    shown = basis("eval", tmp_path / "absent", "--tasks", "arc_easy")
    assert shown.exit_code == 2
    assert "pip install 'basiscli[eval]'" in shown.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--task-limit", "5"], "--tasks"),
        (["--tasks", "a", "--prefill", "exact"], "leave --prefill compressed"),
        (["--tasks", "a,a"], "two have one name"),
        (["--tasks", "a-b,a_b"], "two have one name"),
        (["--tasks", "a", "--task-limit", "0"], "at least 1"),
        (["--tasks", "a", "--few-shot", "-1"], "at least 0"),
        (["--tasks", "a", "--task-path", "empty"], "no task files"),
        (
            ["--tasks", "arc_easy", "--fail-if", "task_arc_challenge_acc < 1"],
            "known: accuracy, cache_bytes_per_token, perplexity, task_arc_easy_*",
        ),
        (["--fail-if", "task_arc_easy_acc < 1"], "no number 'task_arc_easy_acc'"),
    ],
)
def test_what_makes_no_sense_is_refused_before_the_work(
    tmp_path: Path, basis: Basis, monkeypatch: pytest.MonkeyPatch, words: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = basis("eval", "absent", *words)
    assert shown.exit_code == 2
    assert told in shown.stderr
