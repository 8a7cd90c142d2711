"""Recipes that ask for a tokenizer: one vocabulary for models whose tokens differ, and chat templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from basiscli.commands.run.api import plan_run, run
from basiscli.runtime.load import load, load_tokenizer
from tests.conftest import Tensors, basis_process, read_checkpoint
from tests.kv_models import VOCABULARY
from tests.recipes.models import config_of, refused, write_llama, write_recipe

BYTES = 257  # the byte tokenizer's own tokens
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
X, Y = ("<|x|>", "of_x"), ("<|y|>", "<|x|>")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder with models `x` and `y`, whose added tokens differ, and `plain` without any."""
    monkeypatch.chdir(tmp_path)
    write_llama(tmp_path / "x", 1, X)
    write_llama(tmp_path / "y", 2, Y)
    write_llama(tmp_path / "plain", 3)
    return tmp_path


def merged(here: Path, recipe: dict[str, Any], *models: str, out: str = "out") -> Tensors:
    """Run a linear merge with weights 1, 2, 3… and return its tensors."""
    entries = [{"model": name, "parameters": {"weight": n}} for n, name in enumerate(models, start=1)]
    file = write_recipe(here, {"merge_method": "linear", "models": entries} | recipe)
    run(file, output=here / out, overwrite=True)
    return read_checkpoint(here / out)


def row(model: str, token: str, table: str = EMBEDDING) -> Tensor:
    """Return a token's row in a model's table, float64."""
    return read_checkpoint(Path(model))[table][number(token, model)].double()


def number(token: str, model: str = "x") -> int:
    found: int = load_tokenizer(Path(model)).get_vocab()[token]
    return found


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("words", [{"tokenizer_source": "union"}, {"tokenizer": {"source": "union"}}])
def test_a_union_has_every_token_and_its_rows_come_from_the_models_that_have_it(
    here: Path, words: dict[str, Any]
) -> None:
    found = merged(here, words, "x", "y")
    vocabulary = load_tokenizer(here / "out").get_vocab()
    assert vocabulary == load_tokenizer(here / "x").get_vocab() | {"<|y|>": BYTES + 2}  # the first model's come first
    assert load_tokenizer(here / "out").added_tokens_decoder[BYTES + 2].special
    assert config_of(here / "out")["vocab_size"] == len(found[EMBEDDING]) == BYTES + 3
    for table in (EMBEDDING, HEAD):
        for token in ("a", "<|x|>"):  # in both, at different places
            close(found[table][vocabulary[token]], (row("x", token, table) + 2 * row("y", token, table)) / 3)
        close(found[table][vocabulary["of_x"]], row("x", "of_x", table))  # in one: the other takes it from there
        close(found[table][vocabulary["<|y|>"]], row("y", "<|y|>", table))
    x, y = read_checkpoint(here / "x"), read_checkpoint(here / "y")
    name = "model.layers.0.mlp.up_proj.weight"
    close(found[name], (x[name].double() + 2 * y[name].double()) / 3)


def test_a_union_has_the_same_bytes_in_every_process(here: Path) -> None:
    write_llama(here / "many", 4, [f"token_{number}" for number in range(40)])
    models = [{"model": name} for name in ("x", "many")]
    file = write_recipe(here, {"merge_method": "linear", "models": models, "tokenizer_source": "union"})
    for out in ("one", "two"):
        assert basis_process("run", file, "-o", out, "-q", cwd=here, new=True).returncode == 0
    for name in ("model.safetensors", "tokenizer.json"):
        assert (here / "one" / name).read_bytes() == (here / "two" / name).read_bytes()
    added = load_tokenizer(here / "one").get_vocab()
    assert [added[f"token_{number}"] for number in range(40)] == list(range(BYTES + 2, BYTES + 42))


def test_the_result_loads_with_transformers_and_generates(here: Path) -> None:
    merged(here, {"tokenizer_source": "union", "chat_template": "chatml"}, "x", "y")
    model, tokenizer = load(here / "out")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "a boat<|y|>"}], return_tensors="pt")["input_ids"]
    assert (ids == BYTES + 2).any()
    assert model.generate(ids, max_new_tokens=1, do_sample=False).shape[1] == ids.shape[1] + 1


def test_tokens_of_several_models_come_from_the_base_or_are_their_mean(here: Path) -> None:
    found = merged(here, {"tokenizer_source": "union"}, "x", "y", "plain")
    place = load_tokenizer(here / "out").get_vocab()["<|x|>"]
    x, y = row("x", "<|x|>"), row("y", "<|x|>")
    close(found[EMBEDDING][place], (x + 2 * y + 3 * (x + y) / 2) / 6)

    found = merged(here, {"tokenizer_source": "union", "base_model": "y"}, "x", "y", "plain")
    place = load_tokenizer(here / "out").get_vocab()["<|x|>"]
    close(found[EMBEDDING][place], (x + 2 * y + 3 * y) / 6)


def test_the_bases_tokenizer_drops_the_others_tokens(here: Path) -> None:
    found = merged(here, {"tokenizer_source": "base", "base_model": "plain"}, "x", "y")
    assert len(found[EMBEDDING]) == config_of(here / "out")["vocab_size"] == BYTES
    assert load_tokenizer(here / "out").get_vocab() == load_tokenizer(here / "plain").get_vocab()
    close(
        found[EMBEDDING][5],
        (read_checkpoint(here / "x")[EMBEDDING][5] + 2 * read_checkpoint(here / "y")[EMBEDDING][5]) / 3,
    )


@pytest.mark.parametrize("models", [("x", "y"), ("x", "plain")])
def test_the_tokenizer_of_one_model_even_of_one_that_is_not_merged(here: Path, models: tuple[str, str]) -> None:
    found = merged(here, {"tokenizer_source": "y"}, *models)
    vocabulary = load_tokenizer(here / "out").get_vocab()
    assert vocabulary == load_tokenizer(here / "y").get_vocab()
    one, two = models
    if "y" in models:
        close(found[EMBEDDING][vocabulary["<|x|>"]], (row(one, "<|x|>") + 2 * row(two, "<|x|>")) / 3)
        close(found[EMBEDDING][vocabulary["<|y|>"]], row("y", "<|y|>"))
    else:
        close(found[EMBEDDING][vocabulary["<|x|>"]], row("x", "<|x|>"))
        close(found[EMBEDDING][vocabulary["<|y|>"]], torch.zeros(32))


def test_numbers_of_tokens_in_the_configuration_move_with_the_tokens(here: Path) -> None:
    config = config_of(here / "x") | {"eos_token_id": [256, BYTES], "bos_token_id": BYTES}  # <|x|>
    (here / "x" / "config.json").write_text(json.dumps(config))
    (here / "x" / "generation_config.json").write_text(json.dumps({"eos_token_id": BYTES, "top_k": 3}))
    merged(here, {"tokenizer_source": "y"}, "x", "y")  # there <|x|> is the second added token
    assert config_of(here / "out")["eos_token_id"] == [256, BYTES + 1]
    assert config_of(here / "out")["bos_token_id"] == BYTES + 1
    assert json.loads((here / "out" / "generation_config.json").read_text()) == {"eos_token_id": BYTES + 1, "top_k": 3}


def test_tokens_from_where_the_recipe_says(here: Path) -> None:
    tokens = {
        "<|x|>": {"source": "y", "force": True},
        "of_x": {"source": {"kind": "model_token", "model": "y", "token": "a"}},
        "by_number": {"source": {"kind": "model_token", "model": "x", "token_id": 7}},
        "nothing": {"source": {"kind": "zero"}},
    }
    found = merged(here, {"tokenizer": {"source": "union", "tokens": tokens}}, "x", "y")
    vocabulary, table = load_tokenizer(here / "out").get_vocab(), found[EMBEDDING]
    close(table[vocabulary["<|x|>"]], row("y", "<|x|>"))  # forced on the model that has its own
    close(table[vocabulary["of_x"]], (row("x", "of_x") + 2 * row("y", "a")) / 3)
    close(table[vocabulary["by_number"]], read_checkpoint(here / "x")[EMBEDDING][7])
    close(table[vocabulary["nothing"]], torch.zeros(32))


def test_rows_up_to_a_multiple_are_the_mean_of_the_others(here: Path) -> None:
    found = merged(here, {"tokenizer": {"source": "union", "pad_to_multiple_of": 64}}, "x", "y")
    tokens, size = BYTES + 3, 320
    assert config_of(here / "out")["vocab_size"] == len(found[EMBEDDING]) == len(found[HEAD]) == size
    for table in (EMBEDDING, HEAD):
        mean = found[table][:tokens].double().mean(0)
        close(found[table][tokens:], mean.expand(size - tokens, -1))
    model, _ = load(here / "out")
    assert model(input_ids=torch.tensor([[1, size - 1]])).logits.shape[-1] == size


def test_padded_vocabularies_stay_where_nothing_has_to_change(here: Path) -> None:
    for seed, name in enumerate(("p", "q"), start=5):
        write_llama(here / name, seed, rows=VOCABULARY)
    found = merged(here, {"tokenizer_source": "base"}, "p", "q")
    p, q = (read_checkpoint(here / name)[EMBEDDING].double() for name in ("p", "q"))
    assert len(p) > len(load_tokenizer(here / "p"))
    close(found[EMBEDDING], (p + 2 * q) / 3)
    assert config_of(here / "out")["vocab_size"] == VOCABULARY


def test_one_tokenizer_with_more_and_fewer_rows(here: Path) -> None:
    write_llama(here / "padded", 5, rows=VOCABULARY)
    found = merged(here, {"tokenizer_source": "base"}, "padded", "plain")
    assert len(found[EMBEDDING]) == config_of(here / "out")["vocab_size"] == BYTES
    models = [{"model": "padded"}, {"model": "plain"}]
    file = write_recipe(here, {"merge_method": "linear", "models": models})
    refused(lambda: plan_run(file), "shapes differ", "vocabularies differ")


def test_a_model_without_a_tokenizer_is_taken_to_have_the_bases(here: Path) -> None:
    for file in (here / "plain").glob("tokenizer*"):
        file.unlink()
    found = merged(here, {"tokenizer_source": "union"}, "x", "plain")
    close(
        found[EMBEDDING][5],
        (read_checkpoint(here / "x")[EMBEDDING][5] + 2 * read_checkpoint(here / "plain")[EMBEDDING][5]) / 3,
    )
    notes = json.loads((here / "out" / "basis_report.json").read_text())["notes"]
    assert any("plain has no tokenizer: it is taken to have x's" in note for note in notes)
    refused(lambda: merged(here, {"tokenizer_source": "base"}, "plain", "x"), "no tokenizer that loads")


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        ({"tokens": {"a": {"source": "absent"}}}, ["absent is not among the recipe's models"]),
        ({"tokens": {"a": {"source": {"kind": "model_token", "model": "x"}}}}, ["token or a token_id"]),
        (
            {"tokens": {"new": {"source": {"kind": "model_token", "model": "x", "token": "absent"}}}},
            ["x has no row for the token 'new'"],
        ),
        ({"tokens": {"new": {"source": {"kind": "model_token", "model": "x", "token_id": 999}}}}, ["x has no row"]),
        ({"tokens": {"new": {"source": "plain"}}}, ["plain has no row"]),
        ({"tokens": {"new": {"source": {"kind": "none"}}}}, ["tokenizer.tokens.new.source", "model_token and zero"]),
        ({"tokens": {"new": {"sauce": "x"}}}, ["'sauce'", "did you mean 'source'"]),
        ({"pad_to_multiple_of": 0}, ["tokenizer.pad_to_multiple_of", "greater than or equal to 1"]),
    ],
)
def test_what_a_tokenizer_cannot_be_is_refused(here: Path, tokenizer: dict[str, Any], said: list[str]) -> None:
    refused(lambda: merged(here, {"tokenizer": tokenizer}, "x", "plain"), *said)
    assert not (here / "out").exists()


def test_task_vectors_and_models_of_other_tokens(here: Path) -> None:
    """The base takes rows it lacks from where the tokens are: their task vectors are zero there."""
    models = [{"model": name} for name in ("x", "y")]
    recipe = {"merge_method": "task_arithmetic", "base_model": "plain", "models": models, "tokenizer_source": "union"}
    run(write_recipe(here, recipe), output=here / "out")
    found, vocabulary = read_checkpoint(here / "out")[EMBEDDING], load_tokenizer(here / "out").get_vocab()
    close(found[vocabulary["of_x"]], row("x", "of_x"))
    close(found[vocabulary["a"]], row("x", "a") + row("y", "a") - row("plain", "a"))
    mean = (row("x", "<|x|>") + row("y", "<|x|>")) / 2
    close(found[vocabulary["<|x|>"]], row("x", "<|x|>") + row("y", "<|x|>") - mean)


# Chat templates -------------------------------------------------------------------------------------------------------

CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("{{ messages[0].content }}", "{{ messages[0].content }}"),
        ("chatml", "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"),
        ("auto", CHAT),
    ],
)
def test_a_chat_template_by_text_by_name_or_the_commonest(here: Path, word: str, expected: str) -> None:
    for seed, (name, chat) in enumerate({"p": "{{ 1 }}", "q": CHAT, "r": CHAT}.items(), start=5):
        write_llama(here / name, seed, chat=chat)
    merged(here, {"chat_template": word}, "p", "q", "r")
    tokenizer = load_tokenizer(here / "out")
    if word == "chatml":
        said = [{"role": "user", "content": "hello"}]
        assert tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True) == expected
    else:
        assert tokenizer.chat_template == expected
    assert tokenizer.get_vocab() == load_tokenizer(here / "p").get_vocab()


def test_without_a_template_auto_says_so_and_other_words_are_refused(here: Path) -> None:
    merged(here, {"chat_template": "auto"}, "x", "x")
    assert "no model has one" in (here / "out" / "basis_report.json").read_text()
    refused(
        lambda: merged(here, {"chat_template": "llama3"}, "x", "x"), "no chat template is called 'llama3'", "chatml"
    )
