"""`basis compress` and `basis eval` as their users meet them."""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import Result

import basiscli
from basiscli.checkpoints.kv_file import read_kv_bases
from basiscli.checkpoints.writer import PartialOutput
from basiscli.commands.kv.run import KVRun
from basiscli.commands.kv.search import GreedySearch
from basiscli.commands.kv.training import Training
from basiscli.linalg.orthogonal import orthogonality_error
from basiscli.runtime.caches import cache_of, given_cache
from tests.cli.test_commands import NO_TORCH
from tests.conftest import basis_process, read_checkpoint, snapshot, stop_after
from tests.kv_models import ARCHITECTURES, llama, logits_of, make_model, make_text, save_model, some_ids

Basis = Callable[..., Result]
MADE = ("model.safetensors", "kv_projection.safetensors", "kv_projection.json", "config.json")
IDS = some_ids(count=2, length=30)


@pytest.fixture
def m(tmp_path: Path) -> Path:
    """Return a tiny model `m`, and text beside it."""
    (tmp_path / "text.txt").write_text(make_text(1500))
    return save_model(tmp_path / "m", make_model())


def words(model: Path, *more: str | Path, ratio: str = "0.5", steps: str = "2", search: str = "uniform") -> list[Any]:
    text = model.parent / "text.txt"
    quick = ["--calibration", text, "--train-steps", steps, "--length", "32", "--search", search]
    return ["compress", model, "--kv-ratio", ratio, *quick, *more]


def done(result: Result) -> Result:
    assert result.exit_code == 0, result.stderr
    return result


def made(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in MADE}


def report_of(folder: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((folder / "basis_report.json").read_text())
    return table


def logits(folder: Path, **options: Any) -> torch.Tensor:
    return logits_of(basiscli.load(folder, device="cpu", **options)[0], IDS)


def dense_logits(folder: Path) -> torch.Tensor:
    return logits_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), IDS)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest difference relative to the largest logit."""
    return float((a - b).abs().max() / b.abs().max())


# The command ----------------------------------------------------------------------------------------------------------


def test_the_plain_command_inside_a_checkpoint(m: Path) -> None:
    before = snapshot(m)
    quick = ("--train-steps", "2", "--search", "uniform")
    result = basis_process("compress", "--kv-ratio", "0.6", *quick, cwd=m)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{m}-kv0.6\n"
    assert "small built-in mix" in result.stderr
    assert "removed 60.4%, kept 39.6%" in result.stderr  # 38 of 96 levels
    assert "\x1b" not in result.stderr
    assert snapshot(m) == before
    assert sorted(folder.name for folder in m.parent.iterdir()) == ["m", "m-kv0.6", "text.txt"]


def test_json_is_one_document_and_quiet_is_the_path_alone(m: Path) -> None:
    result = basis_process(*words(m, "--json"))
    document = json.loads(result.stdout)
    assert document["output"] == f"{m}-kv0.5"
    assert document["kv"]["kept"] == 0.5
    assert "tensors" not in document
    quiet = basis_process(*words(m, "--quiet", "-o", m.with_name("q"), search="greedy"))
    assert (quiet.stdout, quiet.stderr) == (f"{m.with_name('q')}\n", "")


def test_a_dry_run_writes_nothing_and_imports_no_torch(m: Path) -> None:
    before = snapshot(m.parent)
    command = [str(word) for word in words(m, "--dry-run")]
    for more in ([], ["--json"], ["--fold-v", "--export", "remote-code"]):
        result = subprocess.run(
            [sys.executable, "-c", NO_TORCH, *command, *more], capture_output=True, text=True, check=True
        )
        assert "imported: []" in result.stderr
        if more == ["--json"]:
            plan = json.loads(result.stdout)
            assert plan["output"] == f"{m}-kv0.5"
            assert (plan["layers"], plan["kv_heads"], plan["head_dim"]) == (3, 2, 16)
            assert (plan["kept"], plan["train_steps"], plan["train_tokens"]) == (0.5, 2, 128)
    assert snapshot(m.parent) == before
    assert not list(m.parent.glob("*kv0.5*"))


def test_the_planned_size_is_the_written_size(m: Path, basis: Basis) -> None:
    plan = json.loads(done(basis(*words(m, "--dry-run", "--json"))).stdout)
    done(basis(*words(m)))
    assert plan["write_bytes"] == (m.with_name("m-kv0.5") / "model.safetensors").stat().st_size


def test_a_budget_is_the_ratio_said_the_other_way_round(m: Path, basis: Basis) -> None:
    done(basis(*words(m, ratio="0.6")))
    ratio = m.with_name("m-kv0.6")
    ratio.rename(m.with_name("by-ratio"))
    command = words(m)
    command[2:4] = ["--kv-budget", "0.4"]
    done(basis(*command))
    assert made(ratio) == made(m.with_name("by-ratio"))


def test_options_from_a_config_file(m: Path, basis: Basis, tmp_path: Path) -> None:
    (tmp_path / "kv.yaml").write_text("kv-ratio: 0.25\ntrain-steps: 0\nsearch: spectrum\n")
    text = tmp_path / "text.txt"
    done(basis("compress", m, "--config", tmp_path / "kv.yaml", "--length", "32", "--calibration", text))
    kv = report_of(m.with_name("m-kv0.25"))["kv"]
    assert (kv["kept"], kv["search"], kv["trained_steps"]) == (0.75, "spectrum", 0)


def test_a_single_file_of_weights(m: Path, basis: Basis) -> None:
    done(basis(*words(m / "model.safetensors", "--calibration", m.parent / "text.txt")))
    assert (m.with_name("m-kv0.5") / "kv_projection.json").is_file()


# The result -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_compressed_and_loaded(name: str, tmp_path: Path, basis: Basis) -> None:
    (tmp_path / "text.txt").write_text(make_text(1500))
    model = save_model(tmp_path / "m", make_model(name))
    before = snapshot(model)
    done(basis(*words(model)))
    out = tmp_path / "m-kv0.5"
    assert snapshot(model) == before
    done(basis("verify", out))
    found = read_kv_bases(out)
    assert orthogonality_error(found.bases) < 1e-5
    assert found.config.kept == 0.5
    assert all(torch.equal(x, read_checkpoint(out)[key]) for key, x in read_checkpoint(model).items())
    assert torch.equal(dense_logits(out), dense_logits(model))

    small, tokenizer = basiscli.load(out, device="cpu")
    assert difference(logits_of(small, IDS), dense_logits(model)) > 1e-3
    assert tokenizer.decode(tokenizer("größer")["input_ids"]) == "größer"
    with torch.no_grad():
        first = small(IDS[:, :14], use_cache=True)
        rest = small(IDS[:, 14:], use_cache=True, **given_cache(small, cache_of(first)))
    together = torch.cat([first.logits, rest.logits], 1)
    assert difference(together, logits_of(small, IDS)) < 1e-5
    for layer, keys, values in zip(
        cache_of(rest).layers, found.config.key_ranks, found.config.value_ranks, strict=True
    ):
        assert (layer.keys.shape[-1], layer.values.shape[-1]) == (sum(keys), sum(values))
    generated = small.generate(IDS[:1, :8], max_new_tokens=10, do_sample=False)
    assert generated.shape == (1, 18)


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-sliding", "gemma3"])
def test_at_ratio_zero_it_is_the_dense_model(name: str, tmp_path: Path, basis: Basis) -> None:
    (tmp_path / "text.txt").write_text(make_text(1500))
    model = save_model(tmp_path / "m", make_model(name))
    done(basis(*words(model, ratio="0", search="greedy")))
    out = tmp_path / "m-kv0"
    assert difference(logits(out), dense_logits(model)) < 1e-5
    assert report_of(out)["kv"]["kept"] == 1


def test_without_training_the_bases_are_the_start(m: Path, basis: Basis, monkeypatch: pytest.MonkeyPatch) -> None:
    done(basis(*words(m, "-o", m.with_name("none"), steps="0")))
    bases = read_kv_bases(m.with_name("none")).bases
    starts = []
    run = Training.run

    def keep(self: Training, progress: Any) -> torch.Tensor:
        starts.append(self.start.clone())
        return run(self, progress)

    monkeypatch.setattr(Training, "run", keep)
    done(basis(*words(m, "-o", m.with_name("some"))))
    assert torch.equal(bases, starts[0])
    assert not torch.equal(read_kv_bases(m.with_name("some")).bases, bases)
    assert report_of(m.with_name("none"))["kv"]["losses"] == []


def test_the_report_says_what_was_done(m: Path, basis: Basis) -> None:
    done(basis(*words(m, "-p", "start=pca", ratio="0.6", search="greedy", steps="3")))
    out = m.with_name("m-kv0.6")
    report, config = report_of(out), json.loads((out / "kv_projection.json").read_text())
    kv, numbers = report["kv"], report["numbers"]
    ranks = [rank for layer in [*kv["key_ranks"], *kv["value_ranks"]] for rank in layer]
    assert len(ranks) == 12
    assert all(rank % 2 == 0 and 2 <= rank <= 16 for rank in ranks)
    assert sum(ranks) == 2 * 38  # 40 % of 96 levels, rounded down
    assert kv["kept"] == numbers["cache_kept"] == sum(ranks) / (12 * 16)
    assert numbers["cache_removed"] == 1 - kv["kept"]
    assert kv["bytes_per_token"] == 4 * sum(ranks)
    assert kv["dense_bytes_per_token"] == 4 * 12 * 16
    assert (kv["key_ranks"], kv["value_ranks"]) == (config["key_ranks"], config["value_ranks"])
    assert (kv["trained_steps"], kv["trained_tokens"], len(kv["losses"])) == (3, 3 * 2 * 32, 3)
    assert kv["calibration"]["name"] == "text.txt"
    assert kv["calibration"]["tokens"] == 1501 // 32 * 32
    assert (kv["search"], kv["values_folded"], kv["head_dim"]) == ("greedy", False, 16)
    assert numbers["orthogonality_error"] < 1e-5
    assert numbers["full_rank_error"] < 1e-4
    assert 1 <= numbers["search_rounds"] <= 24
    assert numbers["search_kl"] > 0
    assert report["method"]["name"] == "matryoshka"
    assert report["method"]["parameters"]["start"] == "pca"
    assert report["command"] == "compress"
    assert {tensor["action"] for tensor in report["tensors"]} == {"copied"}
    assert report["sources"][0]["digest"] == report["weights_digest"]
    dense = basiscli.evaluate(m, text=m.parent / "text.txt", length=32, windows=2)
    small = basiscli.evaluate(out, text=m.parent / "text.txt", length=32, windows=2)
    assert small.model.cache_bytes_per_token == kv["bytes_per_token"]
    assert dense.model.cache_bytes_per_token == kv["dense_bytes_per_token"]


def test_half_precision_weights_count_two_bytes(tmp_path: Path, basis: Basis) -> None:
    (tmp_path / "text.txt").write_text(make_text(1500))
    model = save_model(tmp_path / "m", make_model().to(torch.bfloat16))
    done(basis(*words(model)))
    assert report_of(tmp_path / "m-kv0.5")["kv"]["dense_bytes_per_token"] == 2 * 12 * 16
    done(basis(*words(model, "--dtype", "f32", "-o", tmp_path / "wide")))
    assert report_of(tmp_path / "wide")["kv"]["dense_bytes_per_token"] == 4 * 12 * 16
    assert {x.dtype for x in read_checkpoint(tmp_path / "wide").values()} == {torch.float32}
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"
    a, b = (dense_logits(folder) for folder in (model, tmp_path / "wide"))
    assert torch.equal(a, b)


def test_the_windows_that_decide_between_ranks_are_not_trained_on(
    m: Path, basis: Basis, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: dict[str, set[tuple[int, ...]]] = {}
    for owner, name in ((Training, "training"), (GreedySearch, "search")):
        run = owner.run

        def keep(self: Any, *given: Any, run: Any = run, name: str = name) -> Any:
            windows = self.held if name == "search" else self.windows
            rows[name] = {tuple(row) for row in windows.ids.tolist()}
            return run(self, *given)

        monkeypatch.setattr(owner, "run", keep)
    done(basis(*words(m, search="greedy")))
    assert len(rows["search"]) == 8
    assert len(rows["training"]) == 1501 // 32 - 8
    assert not rows["training"] & rows["search"]


@pytest.mark.parametrize("search", ["uniform", "spectrum", "greedy"])
def test_the_cache_never_takes_more_than_the_budget(m: Path, basis: Basis, search: str) -> None:
    done(basis(*words(m, "-o", m.with_name("first"))))
    for ratio, kept in (("0.01", 95 / 96), ("0.333", 64 / 96), ("0.875", 1 / 8)):
        out = m.with_name(f"m{ratio}")
        done(basis(*words(m.with_name("first"), "-o", out, ratio=ratio, search=search)))
        assert report_of(out)["kv"]["kept"] == kept


def test_the_model_card_has_the_command_that_makes_it_again(
    m: Path, basis: Basis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done(basis(*words(m, "--fold-v", "-p", "start=pca", "--seed", "5", search="spectrum")))
    out = m.with_name("m-kv0.5")
    card = (out / "README.md").read_text()
    assert "keeps 50.0 % of its bytes" in card
    assert 'basiscli.load("m-kv0.5")' in card
    (command,) = [line for line in card.splitlines() if line.startswith("basis compress")]
    first = made(out)
    shutil.rmtree(out)
    monkeypatch.chdir(tmp_path)
    done(basis(*shlex.split(command)[1:]))
    assert made(out) == first


def test_inspect_shows_the_cache(m: Path, basis: Basis) -> None:
    done(basis(*words(m)))
    shown = done(basis("inspect", m.with_name("m-kv0.5"))).stdout
    assert "basis compress --method matryoshka of m" in shown
    assert "50.0% kept" in shown


def test_verify_finds_changed_bases_and_ranks(m: Path, basis: Basis) -> None:
    done(basis(*words(m)))
    out = m.with_name("m-kv0.5")
    bases, config = out / "kv_projection.safetensors", out / "kv_projection.json"
    raw = bases.read_bytes()
    bases.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert basis("verify", out).exit_code == 3
    bases.write_bytes(raw)
    done(basis("verify", out))
    table = json.loads(config.read_text())
    table["key_ranks"][0][0] = 2
    config.write_text(json.dumps(table))
    assert basis("verify", out).exit_code == 3


# Again at another ratio -----------------------------------------------------------------------------------------------


def test_a_result_gets_other_ranks_without_training(m: Path, basis: Basis, monkeypatch: pytest.MonkeyPatch) -> None:
    done(basis(*words(m, "-p", "kl_weight=0.5")))
    first = m.with_name("m-kv0.5")
    before = snapshot(first)

    def trained(*_: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(Training, "run", trained)
    monkeypatch.setattr(KVRun, "_moments", trained)
    result = done(basis(*words(first, ratio="0.75", search="greedy", steps="500")))
    out = m.with_name("m-kv0.5-kv0.75")
    assert "are used as they are" in result.stderr
    assert "training 500 steps" not in result.stderr
    assert snapshot(first) == before
    assert (out / "kv_projection.safetensors").read_bytes() == (first / "kv_projection.safetensors").read_bytes()
    kv = report_of(out)["kv"]
    assert kv["kept"] == 0.25
    assert (kv["trained_steps"], kv["trained_tokens"]) == (2, 128)
    assert report_of(out)["method"]["parameters"]["kl_weight"] == 0.5
    assert (out / "model.safetensors").read_bytes() == (m / "model.safetensors").read_bytes()


def test_going_down_and_up_again_gives_the_same_ranks(m: Path, basis: Basis) -> None:
    done(basis(*words(m, search="greedy")))
    first, low, back = m.with_name("m-kv0.5"), m.with_name("low"), m.with_name("back")
    done(basis(*words(first, "-o", low, ratio="0.8", search="greedy")))
    done(basis(*words(low, "-o", back, search="greedy")))
    assert made(back) == made(first)


# Interruption ---------------------------------------------------------------------------------------------------------


def save_every_step(patch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(step=100)
    patch.setattr("basiscli.commands.kv.training.time", SimpleNamespace(monotonic=lambda: next(clock)))


@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [
        (KVRun, "_moments", 0),
        (Training, "_step", 3),
        (GreedySearch, "_differences", 1),
        (PartialOutput, "record", 1),
        (PartialOutput, "record", 12),
        (PartialOutput, "commit", 0),
        (PartialOutput, "_take_the_name", 0),
    ],
)
def test_an_interrupted_run_ends_with_the_same_bytes(
    m: Path, basis: Basis, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, calls: int
) -> None:
    save_every_step(monkeypatch)
    command = words(m, "--workers", "1", "--fold-v", steps="5", search="greedy")
    whole, out = m.with_name("whole"), m.with_name("out")
    before = snapshot(m)
    done(basis(*command, "-o", whole))
    with monkeypatch.context() as patch:
        stop_after(patch, owner, name, calls)
        result = basis(*command, "-o", out)
    assert result.exit_code == 130
    assert "the same command goes on" in result.stderr
    assert not out.exists()
    steps: list[int] = []
    with monkeypatch.context() as patch:
        real = Training._step
        patch.setattr(Training, "_step", lambda self, step, *rest: (steps.append(step), real(self, step, *rest))[1])
        done(basis(*command, "-o", out))
    assert steps == {"_moments": [0, 1, 2, 3, 4], "_step": [3, 4]}.get(name, [])  # nothing finished is done again
    assert made(out) == made(whole)
    reports = [report_of(folder) for folder in (out, whole)]
    for report in reports:
        del report["cost"], report["created"]
    assert reports[0] == reports[1]
    assert sorted(file.name for file in out.iterdir()) == sorted(file.name for file in whole.iterdir())
    assert not out.with_name("out.partial").exists()
    assert snapshot(m) == before


def test_other_text_starts_anew(m: Path, basis: Basis, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where the text is one of a folder, whose own time stamp does not change."""
    texts = tmp_path / "texts"
    texts.mkdir()
    (tmp_path / "text.txt").rename(texts / "a.txt")
    save_every_step(monkeypatch)
    command = words(m, "--calibration", texts, steps="5")
    with monkeypatch.context() as patch:
        stop_after(patch, Training, "_step", 4)
        assert basis(*command, "-o", tmp_path / "out").exit_code == 130
    (texts / "a.txt").write_text(make_text(1500, seed=9))
    done(basis(*command, "-o", tmp_path / "out"))
    done(basis(*command, "-o", tmp_path / "whole"))
    assert made(tmp_path / "out") == made(tmp_path / "whole")


def test_two_runs_write_the_same_bytes(m: Path, basis: Basis) -> None:
    command = words(m, search="greedy")
    done(basis(*command, "-o", m.with_name("a"), "--workers", "1"))
    done(basis(*command, "-o", m.with_name("b"), "--workers", "3"))
    assert made(m.with_name("a")) == made(m.with_name("b"))
    done(basis(*command, "-o", m.with_name("c"), "--seed", "1"))
    assert made(m.with_name("a")) != made(m.with_name("c"))


def test_an_earlier_result_is_replaced_when_asked(m: Path, basis: Basis) -> None:
    done(basis(*words(m)))
    first = made(m.with_name("m-kv0.5"))
    done(basis(*words(m, "--overwrite", "--seed", "2")))
    assert made(m.with_name("m-kv0.5")) != first


# basis eval -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(m: Path, basis: Basis) -> Path:
    """Return `m` with 40 % of its cache."""
    done(basis(*words(m, ratio="0.6", search="spectrum")))
    return m.with_name("m-kv0.6")


def evaluation(basis: Basis, model: Path, *more: str | Path) -> Any:
    text = model.parent / "text.txt"
    return json.loads(done(basis("eval", model, "--text", text, "--length", "32", *more, "--json")).stdout)


def test_eval_measures_quality_cache_and_speed(m: Path, small: Path, basis: Basis) -> None:
    found = evaluation(basis, small, "--against", m, "--contexts", "16,32", "--new-tokens", "3", "--windows", "5")
    config = json.loads((small / "kv_projection.json").read_text())
    ranks = sum(map(sum, [*config["key_ranks"], *config["value_ranks"]]))
    assert found["model"]["cache_bytes_per_token"] == 4 * ranks
    assert found["against"]["cache_bytes_per_token"] == 4 * 12 * 16
    assert found["numbers"]["cache_kept"] == ranks / (12 * 16)
    assert found["tokens"] == 5 * 31
    assert found["kl"] > 1e-4
    assert 0 < found["agreement"] < 1
    assert set(found["model"]["decode_tokens_per_second"]) == {"16", "32"}
    assert all(speed > 0 for speed in found["against"]["decode_tokens_per_second"].values())
    assert {"decode_speedup_16", "decode_speedup_32", "perplexity_increase", "kl"} <= set(found["numbers"])


def test_eval_is_its_definition(m: Path, small: Path, basis: Basis) -> None:
    found = evaluation(basis, small, "--against", m, "--windows", "1000")
    tokenizer = basiscli.load(m, device="cpu")[1]
    ids = tokenizer((m.parent / "text.txt").read_text() + "<|end|>", verbose=False, return_tensors="pt")["input_ids"][0]
    ids = ids[: len(ids) // 32 * 32].view(-1, 32)
    q = logits_of(basiscli.load(small, device="cpu")[0], ids).double().log_softmax(-1)[:, :-1]
    p = logits_of(basiscli.load(m, device="cpu")[0], ids).double().log_softmax(-1)[:, :-1]
    wanted = ids[:, 1:, None]
    assert found["tokens"] == wanted.numel()
    assert found["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert found["agreement"] == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    for figures, log in ((found["model"], q), (found["against"], p)):
        assert figures["perplexity"] == pytest.approx(float(log.gather(-1, wanted).mean().neg().exp()), rel=1e-4)
        assert figures["accuracy"] == pytest.approx(float((log.argmax(-1) == wanted[..., 0]).double().mean()))


def test_against_itself_there_is_no_difference(small: Path, basis: Basis) -> None:
    for prefill in ("compressed", "exact"):
        found = evaluation(basis, small, "--against", small, "--prefill", prefill)
        assert found["kl"] == 0
        assert found["agreement"] == 1
        assert found["numbers"]["cache_kept"] == 1
        assert found["numbers"]["perplexity_increase"] == 0


def test_with_exact_prefill_the_second_halves_count(m: Path, small: Path, basis: Basis) -> None:
    exact = evaluation(basis, small, "--against", m, "--prefill", "exact", "--windows", "5")
    assert exact["tokens"] == 5 * 15
    assert exact["prefill"] == "exact"
    assert exact["kl"] > 1e-6  # the second half sees the first through the cache
    dense = evaluation(basis, m, "--against", m, "--prefill", "exact", "--windows", "5")
    assert dense["kl"] == 0
    assert dense["model"]["perplexity"] == pytest.approx(exact["against"]["perplexity"], rel=1e-6)


def test_eval_shows_a_table(m: Path, small: Path, basis: Basis) -> None:
    more = ["--text", m.parent / "text.txt", "--length", "32", "--contexts", "16", "--new-tokens", "2"]
    shown = done(basis("eval", small, "--against", m, *more)).stdout
    lines = {line.partition("  ")[0]: line.split() for line in shown.splitlines()}
    assert shown.splitlines()[0].split() == ["m-kv0.6", "m", "ratio"]
    assert lines["cache, bytes a token"][-2:] == ["768", "0.396"]
    assert "perplexity" in lines
    assert "decode after 16, tokens/s" in lines
    assert "KL " in shown
    alone = done(basis("eval", m, *more)).stdout
    assert "KL " not in alone
    assert "ratio" not in alone


@pytest.mark.parametrize(
    ("more", "code", "cause"),
    [
        (["--contexts", "16,many"], 2, "not a list of whole numbers"),
        (["--contexts", "0"], 2, "a context of 0 tokens"),
        (["--contexts", "16,500"], 2, "a context of 500 tokens"),  # 512 − 16 new ones is the most
        (["--prefill", "some"], 2, "--prefill some"),
        (["--length", "4"], 2, "length 4"),
        (["--windows", "0"], 2, "windows 0"),
        (["--new-tokens", "0"], 2, "new_tokens 0"),
        (["--text", "nosuch.txt"], 3, "no such calibration file"),
        (["--length", "5000"], 3, "fewer than one window"),
        (["--against", "nosuch"], 3, "no such model"),
        (["--against", "other"], 3, "the vocabularies differ"),
    ],
)
def test_what_eval_refuses(
    m: Path, basis: Basis, monkeypatch: pytest.MonkeyPatch, more: list[str], code: int, cause: str
) -> None:
    monkeypatch.chdir(m.parent)
    if "other" in more:
        save_model(m.with_name("other"), llama(vocab_size=300))
    result = basis("eval", m, "--text", "text.txt", "--length", "32", *more)
    assert result.exit_code == code
    assert f"error: {cause}" in result.stderr or cause in result.stderr.splitlines()[0]
    assert "to do: " in result.stderr
    assert result.stdout == ""
