"""`basis init` and `basis extract` as their users meet them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import Result

import basiscli
from basiscli.checkpoints.writer import JOURNAL
from basiscli.reports.schema import read_report
from tests import kv_models
from tests.conftest import Tensors, basis_process, make_tensors, read_checkpoint, snapshot, stop_after, write_checkpoint
from tests.init_models import (
    Interrupts,
    Make,
    answer,
    check_pair,
    factors,
    gpt2,
    llama,
    load,
    off,
    quiet_peft,
    qwen2,
    save,
    shards_of,
    with_peft,
)

pytestmark = quiet_peft
Basis = Callable[..., Result]
UP, QUERY = "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"
NO_TORCH = """
import sys
from basiscli.cli import app
try:
    app()
finally:
    heavy = [m for m in ("torch", "transformers", "peft", "numpy") if m in sys.modules]
    print("imported:", heavy, file=sys.stderr)
"""


def least_memory(*words: str | Path, output: Path) -> int:
    """Peak memory in bytes of a command with one worker: of two runs the smaller, since what the heap's fragments add
    (10 MB now and then) is chance, and what a run holds is not."""
    peaks = []
    for _ in range(2):
        done = basis_process(*words, "--workers", "1", "-o", output, "--json", OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
        peaks.append(json.loads(done.stdout)["cost"]["peak_memory_bytes"])
        shutil.rmtree(output)
    return min(peaks)


def tensors() -> Tensors:
    return {name: tensor for name, tensor in make_tensors(0).items() if "empty" not in name}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", tensors())


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `base`, and `tuned`, whose linear layers differ from it by rank 3 and nothing else does."""
    home = tmp_path_factory.mktemp("tuned")
    fine_tune(home, llama)
    return home


def fine_tune(home: Path, make: Make, rank: int = 3, elsewhere: float = 0.0) -> None:
    """Write a base, and a fine-tune of it of a given rank."""
    save(make, home / "base")
    shutil.copytree(home / "base", home / "tuned")
    generator = torch.Generator().manual_seed(3)
    changed = {}
    for name, tensor in read_checkpoint(home / "base").items():
        left, right = (torch.randn(side, rank, generator=generator) for side in (tensor.shape[0], tensor.shape[-1]))
        linear = tensor.dim() == 2 and not any(part in name for part in ("embed", "wte", "wpe", "lm_head"))
        changed[name] = tensor + (0.02 * left @ right.mT if linear else elsewhere)
    write_checkpoint(home / "tuned", changed, json.loads((home / "base" / "config.json").read_text()))


# Extract --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llama, qwen2, gpt2])
@pytest.mark.parametrize("options", [{}, {"alpha": 7.0}, {"rslora": True, "rank": 5}], ids=str)
def test_at_its_rank_a_fine_tune_is_the_base_with_the_adapter(
    tmp_path: Path, make: Make, options: dict[str, Any]
) -> None:
    fine_tune(tmp_path, make)
    words = {"rank": 3} | options
    result = basiscli.extract(tmp_path / "tuned", base=tmp_path / "base", output=tmp_path / "out", **words)
    assert (result.adapter, result.residual) == (tmp_path / "out", None)
    expected, pair = answer(load(tmp_path / "tuned")), with_peft(tmp_path / "base", result.adapter)
    assert off(answer(pair), expected) < 1e-5
    with pair.disable_adapter():
        assert off(answer(pair), expected) > 1e-2
    config = json.loads((result.adapter / "adapter_config.json").read_text())
    scaling = words.get("alpha", words["rank"]) / words["rank"] ** (0.5 if config["use_rslora"] else 1)
    before, after = read_checkpoint(tmp_path / "base"), read_checkpoint(tmp_path / "tuned")
    for module, (b, a) in factors(result.adapter).items():
        update = scaling * (b @ a).double()
        name = f"{module}.weight"
        total = before[name].double() + (update.mT if make is gpt2 else update)
        assert off(total, after[name]) < 1e-5
        torch.testing.assert_close(b.mT @ b, a @ a.mT, rtol=1e-3, atol=1e-4)  # balanced
    assert result.report.numbers["energy_least"] > 1 - 1e-8
    assert result.report.adapter is not None
    assert len(result.report.adapter.modules) == len(factors(result.adapter))


def test_below_its_rank_the_report_says_what_is_lost(tuned: Path, tmp_path: Path) -> None:
    result = basiscli.extract(tuned / "tuned", base=tuned / "base", rank=2, output=tmp_path / "out")
    before, after = read_checkpoint(tuned / "base"), read_checkpoint(tuned / "tuned")
    assert result.report.adapter is not None
    squares: list[tuple[Tensor, Tensor]] = []
    for module, record in result.report.adapter.modules.items():
        difference = after[f"{module}.weight"].double() - before[f"{module}.weight"].double()
        values = torch.linalg.svdvals(difference).square()
        squares.append((values[:2].sum(), values.sum()))
        assert record.energy == pytest.approx(float(values[:2].sum() / values.sum()), abs=1e-5)
        assert record.norm == pytest.approx(float(difference.norm()), rel=1e-5)
        b, a = factors(result.adapter)[module]
        assert off(difference - (b @ a).double(), difference - best(difference, 2)) < 1e-4
        assert record.error is None
    held, total = (sum(pair[n] for pair in squares) for n in (0, 1))
    assert result.report.numbers["energy"] == pytest.approx(float(held / total), abs=1e-5)
    assert 0.3 < result.report.numbers["energy_least"] < result.report.numbers["energy"] < 0.99


def best(weight: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def test_an_extracted_adapter_is_small_and_plain(tuned: Path, tmp_path: Path) -> None:
    result = basiscli.extract(tuned / "tuned", base=tuned / "base", rank=3, output=tmp_path / "out")
    assert sorted(file.name for file in result.path.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "basis_report.json"
    ]  # fmt: skip
    config = json.loads((result.path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tuned / "base")
    assert config["init_lora_weights"] is True  # peft loads the factors as they are
    count = sum(b.numel() + a.numel() for b, a in factors(result.path).values())
    assert result.report.numbers["adapter_parameters"] == count
    size = (result.path / "adapter_model.safetensors").stat().st_size
    assert size == result.report.cost.written_bytes
    assert 4 * count < size < 4 * count + 6000
    both = [basiscli.inspect(tuned / name).total.nbytes for name in ("tuned", "base")]
    assert result.report.cost.read_bytes == sum(both)
    assert [(source.role, source.spec) for source in result.report.sources] == [
        ("model", str(tuned / "tuned")), ("base", str(tuned / "base"))
    ]  # fmt: skip


@pytest.mark.parametrize("elsewhere", [0.0, 0.1])
def test_what_is_not_in_the_adapter_is_said(tmp_path: Path, basis: Basis, elsewhere: float) -> None:
    """Only headers are known when the note is made: it must not say whether the others differ."""
    fine_tune(tmp_path, llama, elsewhere=elsewhere)
    words = [tmp_path / "tuned", "--base", tmp_path / "base", "-r", "3", "-o", tmp_path / "out"]
    result = basis("extract", *words)
    assert result.exit_code == 0, result.stderr
    left = len(read_checkpoint(tmp_path / "base")) - 14
    note = f"{left} other tensors are not compared: what the fine-tune changed there is not in the adapter"
    assert f"note: {note}\n" in result.stderr
    assert json.loads((tmp_path / "out" / "basis_report.json").read_text())["notes"] == [note]


def test_a_fine_tune_that_changed_nothing(tuned: Path, tmp_path: Path) -> None:
    result = basiscli.extract(tuned / "base", base=tuned / "base", rank=3, output=tmp_path / "out")
    assert not any((b @ a).any() for b, a in factors(result.adapter).values())
    assert result.report.numbers["energy"] == 1.0
    assert off(answer(with_peft(tuned / "base", result.adapter)), answer(load(tuned / "base"))) == 0


def test_the_extracted_adapter_merges_back(tuned: Path, tmp_path: Path) -> None:
    """What basis itself makes of base and adapter is the fine-tune again."""
    adapter = basiscli.extract(tuned / "tuned", base=tuned / "base", rank=3, output=tmp_path / "adapter").path
    merged = basiscli.merge([adapter], method="task_arithmetic", parameters={"lambda": 1}, output=tmp_path / "merged")
    expected = read_checkpoint(tuned / "tuned")
    for name, tensor in read_checkpoint(merged.path).items():
        assert off(tensor, expected[name]) < 1e-6


# As many ranks as hold a share ----------------------------------------------------------------------------------------

UNCHANGED = "model.layers.1.self_attn.k_proj"


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `base`, and `tuned`, whose layers differ from it more or less evenly, but for one."""
    home = tmp_path_factory.mktemp("uneven")
    tune_unevenly(home, llama)
    return home


def tune_unevenly(home: Path, make: Make, dtype: torch.dtype = torch.float32) -> None:
    save(make, home / "base", dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    changed = {}
    for place, (name, tensor) in enumerate(sorted(read_checkpoint(home / "base").items())):
        changed[name] = tensor
        if tensor.dim() == 2 and not any(part in name for part in ("embed", "wte", "wpe", "lm_head", UNCHANGED)):
            u, _, vh = torch.linalg.svd(torch.randn(tensor.shape, generator=generator), full_matrices=False)
            values = torch.exp(-torch.arange(vh.shape[0]) / (1 + place % 7))
            changed[name] = (tensor.float() + (u * values) @ vh).to(dtype)
    write_checkpoint(home / "tuned", changed, json.loads((home / "base" / "config.json").read_text()))


def differences(home: Path) -> Tensors:
    """Return what the fine-tune added to each linear layer, float64 [out, in], by module."""
    before, after = read_checkpoint(home / "base"), read_checkpoint(home / "tuned")
    linear = [n for n, t in before.items() if t.dim() == 2 and ("proj" in n or "c_" in n)]
    turned = {name: after[name].double() - before[name].double() for name in linear}
    return {name.removesuffix(".weight"): x.mT if "c_" in name else x for name, x in turned.items()}


def least_rank(difference: Tensor, energy: float) -> int:
    """Return how many singular values hold a share, to the 1e-6 that is rounding."""
    squares = torch.linalg.svdvals(difference).square()
    return int((squares.cumsum(0) < (energy - 1e-6) * squares.sum()).sum()) + 1 if difference.any() else 0


@pytest.mark.parametrize("options", [{}, {"exact": True}, {"rank": 3}, {"rank": 30, "workers": 1}], ids=str)
@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99, 1.0])
def test_each_module_gets_the_fewest_ranks_that_hold_the_share(
    uneven: Path, tmp_path: Path, energy: float, options: dict[str, Any]
) -> None:
    result = basiscli.extract(uneven / "tuned", base=uneven / "base", energy=energy, output=tmp_path / "out", **options)
    wanted = {m: min(least_rank(d, energy), options.get("rank", 99)) for m, d in differences(uneven).items()}
    assert result.report.adapter is not None
    assert {module: record.rank for module, record in result.report.adapter.modules.items()} == wanted
    assert len(set(wanted.values())) > (1 if "rank" in options else 2)
    stored = factors(result.path)
    assert stored.keys() == wanted.keys() - {UNCHANGED}
    for module, difference in differences(uneven).items():
        record, rank = result.report.adapter.modules[module], wanted[module]
        assert record.norm == pytest.approx(float(difference.norm()), rel=1e-5)
        if module == UNCHANGED:
            assert (rank, record.energy) == (0, 1.0)
            continue
        squares = torch.linalg.svdvals(difference).square()
        assert record.energy == pytest.approx(float(squares[:rank].sum() / squares.sum()), abs=1e-5)
        b, a = stored[module]
        assert off((b @ a).double(), best(difference, rank)) < 1e-4
        torch.testing.assert_close(b.mT @ b, a @ a.mT, rtol=1e-3, atol=1e-5)  # balanced
    numbers = result.report.numbers
    assert (numbers["rank_least"], numbers["rank_most"]) == (0, max(wanted.values()))
    assert numbers["modules"] == len(stored)
    assert "rank" in options or numbers["energy_least"] > energy - 1e-5
    assert (result.path / "adapter_model.safetensors").stat().st_size == result.report.cost.written_bytes


@pytest.mark.parametrize("options", [{}, {"alpha": 5.0}, {"rslora": True}, {"alpha": 5.0, "rslora": True}], ids=str)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_with_peft_the_base_gets_the_truncated_differences(tmp_path: Path, make: Make, options: dict[str, Any]) -> None:
    tune_unevenly(tmp_path, make)
    result = basiscli.extract(
        tmp_path / "tuned", base=tmp_path / "base", energy=0.9, output=tmp_path / "out", **options
    )
    config = json.loads((result.path / "adapter_config.json").read_text())
    found, expected = differences(tmp_path), read_checkpoint(tmp_path / "base")
    ranks = {module: least_rank(difference, 0.9) for module, difference in found.items()}
    kept = {module: rank for module, rank in ranks.items() if rank}
    most = max(kept.values())
    assert (config["r"], config["lora_alpha"]) == (most, options.get("alpha", most))
    assert set(config["target_modules"]) == kept.keys()
    assert config["rank_pattern"] == {module: rank for module, rank in kept.items() if rank != most}
    own = {} if "alpha" in options else {module: rank for module, rank in kept.items() if rank != most}
    assert config["alpha_pattern"] == own
    pair = with_peft(tmp_path / "base", result.path)
    assert {n.rpartition(".lora_A")[0].removeprefix("base_model.model.") for n, _ in pair.named_parameters()
            if "lora_A" in n} == kept.keys()  # fmt: skip
    merged = pair.merge_and_unload().state_dict()
    for module, difference in found.items():
        name = f"{module}.weight"
        update = best(difference, ranks[module])
        wanted = expected[name] + (update.mT if make is gpt2 else update)
        assert off(merged[name], wanted) < 1e-5, module
    again = basiscli.merge([result.path], method="task_arithmetic", parameters={"lambda": 1}, output=tmp_path / "again")
    for name, tensor in read_checkpoint(again.path).items():
        torch.testing.assert_close(tensor, merged[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_narrow_fine_tune(tmp_path: Path, dtype: torch.dtype) -> None:
    tune_unevenly(tmp_path, llama, dtype)
    result = basiscli.extract(tmp_path / "tuned", base=tmp_path / "base", energy=0.95, output=tmp_path / "out")
    for module, difference in differences(tmp_path).items():
        if module == UNCHANGED:
            continue
        b, a = factors(result.path)[module]
        assert (b.dtype, a.dtype) == (dtype, dtype)
        assert len(a) == least_rank(difference, 0.95)
        assert off(b.double() @ a.double(), best(difference, len(a))) < 2 * torch.finfo(dtype).eps


def test_energy_gives_the_same_bytes_for_any_number_of_workers(uneven: Path, tmp_path: Path) -> None:
    results = [
        basiscli.extract(uneven / "tuned", base=uneven / "base", energy=0.9, output=tmp_path / f"{n}", workers=n)
        for n in (1, 2, 5)
    ]
    assert shards_of(results[0].path) == shards_of(results[1].path) == shards_of(results[2].path)
    assert len({result.report.weights_digest for result in results}) == 1
    assert basiscli.verify(results[0].path).checked_digests
    assert sorted(file.name for file in results[0].path.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "basis_report.json", "ranks.svg"
    ]  # fmt: skip


@pytest.mark.parametrize("after", [1, 7, 13])
def test_interrupted_decompositions_are_taken_up_from_scratch_files(uneven: Path, tmp_path: Path, after: int) -> None:
    def run(out: Path, **options: Any) -> basiscli.InitResult:
        return basiscli.extract(uneven / "tuned", base=uneven / "base", energy=0.9, output=out, **options)

    whole, before, out = run(tmp_path / "whole"), snapshot(uneven), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(out, workers=1, progress=Interrupts(after))
    assert not out.exists()
    assert (tmp_path / "out.partial" / JOURNAL).is_file()
    again = run(out, workers=2)
    assert again.report.cost.resumed_steps == after
    assert shards_of(out) == shards_of(whole.path)
    assert again.report.adapter == whole.report.adapter
    assert not (tmp_path / "out.partial").exists()
    assert not (out / "scratch").exists()
    assert not list(out.rglob(JOURNAL))
    assert snapshot(uneven) == before


@pytest.mark.parametrize("written", [0, 1, 6, 12])
def test_an_adapter_that_was_half_written_is_finished(
    uneven: Path, tmp_path: Path, written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal has decompositions and factors then."""
    from basiscli.engine.init_run import InitRun

    def run(out: Path) -> basiscli.InitResult:
        return basiscli.extract(uneven / "tuned", base=uneven / "base", energy=0.9, output=out)

    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, InitRun, "_write_factors", written)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out")
    again = run(tmp_path / "out")
    assert shards_of(again.path) == shards_of(whole.path)
    assert again.report.adapter == whole.report.adapter
    assert basiscli.verify(again.path).checked_digests


def test_scratch_files_that_did_not_reach_the_disk_are_made_again(uneven: Path, tmp_path: Path) -> None:
    def run(out: Path, **options: Any) -> basiscli.InitResult:
        return basiscli.extract(uneven / "tuned", base=uneven / "base", energy=0.9, output=out, **options)

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", workers=1, progress=Interrupts(9))
    files = sorted((tmp_path / "out.partial" / "scratch").iterdir())
    assert len(files) >= 8
    files[0].write_bytes(bytes(files[0].stat().st_size))
    files[1].write_bytes(files[1].read_bytes()[:-1])
    files[2].write_bytes(files[2].read_bytes()[:-1] + b"\x55")
    files[3].unlink()
    again = run(tmp_path / "out")
    assert shards_of(again.path) == shards_of(whole.path)
    assert basiscli.verify(again.path).checked_digests


def test_another_share_starts_anew(uneven: Path, tmp_path: Path) -> None:
    for options in ({"energy": 0.5}, {"energy": 0.9, "rank": 2}, {"rank": 2}):
        with pytest.raises(KeyboardInterrupt):
            basiscli.extract(uneven / "tuned", base=uneven / "base", energy=0.9, output=tmp_path / "out", workers=1,
                             progress=Interrupts(5))  # fmt: skip
        result = basiscli.extract(uneven / "tuned", base=uneven / "base", output=tmp_path / "out", **options)
        assert result.report.cost.resumed_steps == 0
        fresh = basiscli.extract(uneven / "tuned", base=uneven / "base", output=tmp_path / "fresh", **options)
        assert shards_of(result.path) == shards_of(fresh.path)
        shutil.rmtree(result.path)
        shutil.rmtree(fresh.path)


def test_energy_at_the_command_line(uneven: Path, tmp_path: Path, basis: Basis) -> None:
    words = ["extract", uneven / "tuned", "--base", uneven / "base", "--energy", "0.9", "-o", tmp_path / "out"]
    plan = basis(*words, "--dry-run")
    assert plan.exit_code == 0, plan.stderr
    assert "14 modules of what rank 90% of the energy takes, 32 at most" in plan.stdout
    document = json.loads(basis(*words, "-r", "6", "--dry-run", "--json").stdout)
    assert (document["energy"], document["rank"], len(document["modules"])) == (0.9, 6, 14)
    assert not (tmp_path / "out").exists()
    done = basis(*words)
    assert done.exit_code == 0, done.stderr
    ranks = [least_rank(difference, 0.9) for difference in differences(uneven).values()]
    assert f"13 modules of rank 0 to {max(ranks)}" in done.stderr
    report = json.loads((tmp_path / "out" / "basis_report.json").read_text())
    assert sorted(record["rank"] for record in report["adapter"]["modules"].values()) == sorted(ranks)
    shown = json.loads(basis("inspect", tmp_path / "out", "--json").stdout)
    assert shown["facts"]["modules"] == 13


# From data ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `model`, which runs and has a tokenizer, and `text.txt`."""
    home = tmp_path_factory.mktemp("speaking")
    kv_models.save_model(home / "model", kv_models.make_model())
    (home / "text.txt").write_text(kv_models.make_text(2000))
    return home


def data_words(home: Path, out: Path, method: str = "eva") -> list[str | Path]:
    some: list[str | Path] = ["--calibration", home / "text.txt", "--length", "32", "--tokens", "960"]
    return ["init", home / "model", "-m", method, "-r", "4", *some, "-o", out]


def test_eva_at_the_command_line(speaking: Path, tmp_path: Path, basis: Basis) -> None:
    """Every option is what Python calls by the same name."""
    text: Any = {"calibration": speaking / "text.txt", "length": 32, "tokens": 960, "rank": 4, "method": "eva"}
    given: list[tuple[list[str], dict[str, Any]]] = [
        ([], {}),
        (["--rho", "1"], {"rho": 1.0}),
        (["--whiten"], {"whiten": True}),
        (["--no-center"], {"center": False}),
        (["-p", "rho=1", "-p", "whiten=true", "--no-center"], {"rho": 1.0, "whiten": True, "center": False}),
    ]
    for number, (words, parameters) in enumerate(given):
        out = tmp_path / f"{number}"
        done = basis(*data_words(speaking, out), *words, "--json")
        assert done.exit_code == 0, done.stderr
        document = json.loads(done.stdout)
        assert document["method"]["parameters"] == {"rho": 2.0, "whiten": False, "center": True} | parameters
        assert (document["adapter_folder"], document["residual_folder"]) == (str(out / "adapter"), None)
        assert document["adapter"]["calibration"]["tokens"] == 960
        same = basiscli.init(speaking / "model", parameters=parameters, output=tmp_path / f"same-{number}", **text)
        assert shards_of(same.path) == shards_of(out)
    assert len({(tmp_path / f"{n}" / "adapter" / "adapter_model.safetensors").read_bytes() for n in range(5)}) == 5


def test_corda_at_the_command_line(speaking: Path, tmp_path: Path, basis: Basis) -> None:
    for mode in ("instruction", "knowledge"):
        words = [*data_words(speaking, tmp_path / mode, "corda"), "-p", f"mode={mode}", "-p", "damping=0.1"]
        done = basis(*words, "--json")
        assert done.exit_code == 0, done.stderr
        document = json.loads(done.stdout)
        assert document["method"]["parameters"] == {"mode": mode, "damping": 0.1}
        assert document["residual_folder"] == str(tmp_path / mode / "residual")
        assert document["numbers"]["error_most"] < 1e-6
        same = basiscli.init(
            speaking / "model", method="corda", rank=4, parameters={"mode": mode, "damping": 0.1}, length=32,
            tokens=960, calibration=speaking / "text.txt", output=tmp_path / f"same-{mode}",
        )  # fmt: skip
        assert shards_of(same.path) == shards_of(tmp_path / mode)


@pytest.mark.parametrize("method", ["eva", "corda"])
def test_what_the_command_says_of_data(speaking: Path, tmp_path: Path, basis: Basis, method: str) -> None:
    done = basis(*data_words(speaking, tmp_path / "out", method))
    assert done.stdout == f"{tmp_path / 'out'}\n"
    assert "21 modules of rank" in done.stderr
    assert "on 960 tokens" in done.stderr
    assert ("of the inputs’ variance" in done.stderr) == (method == "eva")
    assert ("residual + adapter is the model to" in done.stderr) == (method == "corda")
    quiet = basis(*data_words(speaking, tmp_path / "quiet", method), "--quiet")
    assert (quiet.stdout, quiet.stderr) == (f"{tmp_path / 'quiet'}\n", "")


@pytest.mark.parametrize("json_too", [False, True])
@pytest.mark.parametrize("method", ["eva", "corda"])
def test_a_dry_run_of_data_writes_nothing_and_imports_no_torch(
    speaking: Path, tmp_path: Path, method: str, json_too: bool
) -> None:
    words = [*map(str, data_words(speaking, tmp_path / "out", method)), "--dry-run", *(["--json"] if json_too else [])]
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, *words], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "imported: []" in done.stderr
    assert not list(tmp_path.iterdir())
    if not json_too:
        assert f"21 modules of {'mean ' if method == 'eva' else ''}rank 4, scaling 1" in done.stdout
        assert f"inputs of 960 tokens in windows of 32: {speaking / 'text.txt'}" in done.stdout
        return
    plan = json.loads(done.stdout)
    assert (plan["method"], plan["rank"], len(plan["modules"])) == (method, 4, 21)
    assert plan["calibration"] == {"place": str(speaking / "text.txt"), "tokens": 960, "length": 32}


def test_the_text_that_is_read_without_asking(speaking: Path, tmp_path: Path, basis: Basis) -> None:
    words = ["init", speaking / "model", "-m", "eva", "-r", "4", "-o", tmp_path / "out", "--dry-run", "--json"]
    assert json.loads(basis(*words).stdout)["calibration"] == {"place": None, "tokens": 16384, "length": 512}
    found = json.loads(basis(*words, "--tokens", "100").stdout)["calibration"]
    assert (found["tokens"], found["length"]) == (100, 100)
    assert json.loads(basis(*words, "--length", "64").stdout)["calibration"]["tokens"] == 16384
    plain = json.loads(basis("init", speaking / "model", "-o", tmp_path / "out", "--dry-run", "--json").stdout)
    assert plain["calibration"] is None


def test_the_planned_size_of_corda_is_the_written_size(speaking: Path, tmp_path: Path, basis: Basis) -> None:
    words = [*data_words(speaking, tmp_path / "out", "corda"), "--shard-size", "9kB", "--json"]
    plan = json.loads(basis(*words, "--dry-run").stdout)
    done = json.loads(basis(*words).stdout)
    sizes = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*.safetensors"))
    assert plan["write_bytes"] == sizes == done["cost"]["written_bytes"]


@pytest.mark.parametrize("method", ["eva", "corda"])
def test_no_more_than_a_layer_is_in_memory(tmp_path: Path, method: str) -> None:
    """Five times the layers take the same memory: what is freed goes back to the system at once."""
    peaks, sizes = {}, {}
    for layers in (2, 10):
        folder = tmp_path / str(layers)
        model = kv_models.llama(num_hidden_layers=layers, hidden_size=512, intermediate_size=1024)
        save(lambda model=model: model, folder / "model", dtype=torch.bfloat16)
        sizes[layers] = sum(parameter.numel() * 4 for parameter in model.parameters())
        save_file({"input_ids": kv_models.some_ids(4, 32)}, folder / "tokens.safetensors")
        words = ["init", folder / "model", "-m", method, "-r", "4", "--calibration", folder / "tokens.safetensors"]
        peaks[layers] = least_memory(*words, "--length", "32", "--tokens", "128", output=folder / "out")
        shutil.rmtree(folder)
    assert peaks[10] - peaks[2] < (sizes[10] - sizes[2]) / 4


# Interruptions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["pissa", "milora", "olora", "extract"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(tuned: Path, tmp_path: Path, command: str) -> None:
    def run(out: Path, **options: Any) -> basiscli.InitResult:
        options = {"rank": 3, "output": out, "workers": 1} | options
        if command == "extract":
            return basiscli.extract(tuned / "tuned", base=tuned / "base", **options)
        return basiscli.init(tuned / "tuned", method=command, shard_size="9kB", **options)

    whole, before = run(tmp_path / "whole"), snapshot(tuned)
    out = tmp_path / "out"
    for after in (1, 8, 4):
        with pytest.raises(KeyboardInterrupt):
            run(out, progress=Interrupts(after))
        assert not out.exists()
        assert (tmp_path / "out.partial" / JOURNAL).is_file()
    again = run(out, workers=2)
    assert again.report.cost.resumed_steps == 13
    assert shards_of(out) == shards_of(tmp_path / "whole")
    assert again.report.weights_digest == whole.report.weights_digest
    assert again.report.adapter == whole.report.adapter
    assert not (tmp_path / "out.partial").exists()
    assert not list(out.rglob(JOURNAL))
    assert snapshot(tuned) == before


def test_factors_that_did_not_reach_the_disk_are_made_again(model: Path, tmp_path: Path) -> None:
    whole = basiscli.init(model, rank=4, output=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        basiscli.init(model, rank=4, output=tmp_path / "out", workers=1, progress=Interrupts(8))
    # The copies are done first, and two of the three weights; a machine that lost power has the journal of all.
    file = tmp_path / "out.partial" / "adapter" / "adapter_model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[: len(raw) // 2] + bytes(len(raw) - len(raw) // 2))
    result = basiscli.init(model, rank=4, output=tmp_path / "out")
    assert result.report.weights_digest == whole.report.weights_digest
    assert shards_of(tmp_path / "out") == shards_of(tmp_path / "whole")


@pytest.mark.parametrize("options", [{"rank": 5}, {"alpha": 9.0}, {"seed": 1}, {"rslora": True}, {"exact": True},
                                     {"method": "olora"}, {"target_modules": ["up_proj"]}], ids=str)  # fmt: skip
def test_other_options_start_anew(model: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(KeyboardInterrupt):
        basiscli.init(model, rank=4, output=tmp_path / "out", workers=1, progress=Interrupts(3))
    result = basiscli.init(model, **{"rank": 4} | options, output=tmp_path / "out")
    assert result.report.cost.resumed_steps == 0
    assert basiscli.verify(result.adapter).checked_digests


def test_an_earlier_output_is_replaced_when_asked(model: Path, tmp_path: Path, basis: Basis) -> None:
    for rank in (2, 4):
        done = basis("init", model, "-r", rank, "-o", tmp_path / "out", "--overwrite")
        assert done.exit_code == 0, done.stderr
    assert {a.shape[0] for _, a in factors(tmp_path / "out" / "adapter").values()} == {4}
    assert not (tmp_path / "out.replaced").exists()


# The command line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("json_too", [False, True])
@pytest.mark.parametrize("command", ["init", "extract"])
def test_a_dry_run_writes_nothing_and_imports_no_torch(
    tuned: Path, tmp_path: Path, command: str, json_too: bool
) -> None:
    words = [command, str(tuned / "tuned"), "-r", "3", "-o", str(tmp_path / "out"), "--dry-run"]
    words += ["--base", str(tuned / "base")] if command == "extract" else ["-m", "milora"]
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, *words, *(["--json"] if json_too else [])],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "imported: []" in done.stderr
    assert not list(tmp_path.iterdir())
    if not json_too:
        assert "14 modules of rank 3, scaling 1" in done.stdout
        return
    plan = json.loads(done.stdout)
    assert (plan["method"], plan["rank"]) == ("milora" if command == "init" else "extract", 3)
    assert UP in plan["modules"] and len(plan["modules"]) == 14
    assert plan["base"] == (str(tuned / "base") if command == "extract" else None)


@pytest.mark.parametrize("command", ["init", "extract"])
def test_the_planned_size_is_the_written_size(tuned: Path, tmp_path: Path, basis: Basis, command: str) -> None:
    words = [command, tuned / "tuned", "-r", "3", "-o", tmp_path / "out", "--json"]
    words += ["--base", tuned / "base"] if command == "extract" else ["--shard-size", "9kB"]
    plan = json.loads(basis(*words, "--dry-run").stdout)
    done = json.loads(basis(*words).stdout)
    sizes = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*.safetensors"))
    assert plan["write_bytes"] == sizes == done["cost"]["written_bytes"]


def test_json_is_one_document(tuned: Path, tmp_path: Path) -> None:
    done = basis_process("init", tuned / "base", "-r", "3", "-o", tmp_path / "out", "--json")
    document = json.loads(done.stdout)
    assert document["output"] == str(tmp_path / "out")
    assert document["adapter_folder"] == str(tmp_path / "out" / "adapter")
    assert document["residual_folder"] == str(tmp_path / "out" / "residual")
    assert document["adapter"]["rank"] == 3
    assert document["numbers"]["error_most"] < 1e-6
    assert "tensors" not in document
    words = ["extract", tuned / "tuned", "--base", tuned / "base", "-r", "3", "-o", tmp_path / "lora", "--json"]
    document = json.loads(basis_process(*words).stdout)
    assert (document["adapter_folder"], document["residual_folder"]) == (str(tmp_path / "lora"), None)
    assert document["numbers"]["energy"] > 0.999


def test_quiet_leaves_the_path_alone(model: Path, tmp_path: Path) -> None:
    done = basis_process("init", model, "-r", "4", "-o", tmp_path / "out", "--quiet")
    assert (done.stdout, done.stderr) == (f"{tmp_path / 'out'}\n", "")


def test_the_output_has_a_name_of_its_own(model: Path, tmp_path: Path, basis: Basis, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    done = basis("init", "model", "-r", "4", "-m", "olora")
    assert done.stdout == f"{tmp_path / 'model-olora'}\n"
    assert "3 modules of rank 4" in done.stderr
    assert "residual + adapter is the model to" in done.stderr


@pytest.mark.parametrize(
    ("text", "modules"),
    [
        ("all-linear", 3),
        ("q_proj", 1),
        ("q_proj,up_proj", 2),
        (UP, 1),
        (r".*\.(up|down)_proj", 2),
        (r"model\.layers\.0\..*", 3),
    ],
)
def test_targets_at_the_command_line(model: Path, tmp_path: Path, basis: Basis, text: str, modules: int) -> None:
    done = basis("init", model, "-r", "4", "--target-modules", text, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert len(factors(tmp_path / "out" / "adapter")) == modules


def test_both_parts_verify_and_show_what_they_are(tuned: Path, tmp_path: Path, basis: Basis) -> None:
    result = basiscli.init(tuned / "base", rank=3, alpha=6, rslora=True, output=tmp_path / "out", shard_size="9kB")
    assert result.residual is not None
    for part in (result.adapter, result.residual):
        found = basiscli.verify(part)
        assert found.checked_digests
        assert found.weights_digest == json.loads((part / "basis_report.json").read_text())["weights_digest"]
    shown = json.loads(basis("inspect", result.adapter, "--json").stdout)
    assert shown["kind"] == "adapter"
    assert (shown["facts"]["rank"], shown["facts"]["alpha"], shown["facts"]["rsLoRA"]) == (3, 6.0, True)
    assert shown["facts"]["base"] == str(result.residual)
    assert shown["facts"]["modules"] == 14
    assert "basis init --method pissa" in shown["facts"]["made by"]
    lora = basiscli.extract(tuned / "tuned", base=tuned / "base", rank=3, output=tmp_path / "lora")
    assert basiscli.verify(lora.path).checked_digests
    file = result.adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    assert basis("verify", result.adapter).exit_code == 3


def test_the_folder_around_both_parts_is_no_model(model: Path, tmp_path: Path, basis: Basis) -> None:
    out = tmp_path / "out"
    basiscli.init(model, rank=4, output=out)
    shown = basis("inspect", out)
    assert shown.exit_code == 3
    assert "no weights here" in shown.stderr
    assert f"give {out}/adapter or {out}/residual" in shown.stderr.replace("\n", " ")


def test_both_parts_are_verified_at_once(model: Path, tmp_path: Path, basis: Basis) -> None:
    result = basiscli.init(model, rank=4, output=tmp_path / "out")
    assert result.residual is not None
    found = basiscli.verify(result.path)
    assert found.checked_digests and found.weights_digest == result.report.weights_digest
    parts = [basiscli.verify(part) for part in (result.adapter, result.residual)]
    assert found.tensors == sum(part.tensors for part in parts)
    for part, name in ((result.residual, "model"), (result.adapter, "adapter_model")):
        file = part / f"{name}.safetensors"
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        shown = basis("verify", result.path)
        assert shown.exit_code == 3 and file.name in shown.stderr.replace("\n", "")
        file.write_bytes(whole)
    file.unlink()
    assert basis("verify", result.path).exit_code == 3


def test_the_pair_is_found_again_after_moving(tuned: Path, tmp_path: Path) -> None:
    result = basiscli.init(tuned / "base", rank=3, output=tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "moved")
    moved = basiscli.InitResult(
        tmp_path / "moved", tmp_path / "moved" / "adapter", tmp_path / "moved" / "residual", result.report
    )
    check_pair(tuned / "base", moved)


def test_one_weights_file_is_a_model(model: Path, tmp_path: Path) -> None:
    result = basiscli.init(model / "model.safetensors", rank=4, output=tmp_path / "out")
    assert result.residual is not None
    assert (result.residual / "config.json").is_file()
    assert len(factors(result.adapter)) == 3


def test_a_matrix_without_elements_is_no_target(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", make_tensors(0))
    result = basiscli.init(model, rank=4, output=tmp_path / "out")
    assert len(factors(result.adapter)) == 3
    assert result.residual is not None
    assert read_checkpoint(result.residual)["model.layers.2.empty.weight"].shape == (0, 24)


@pytest.mark.parametrize("command", ["init", "extract"])
def test_a_model_is_never_in_memory(tmp_path: Path, command: str) -> None:
    """Four times the layers take the same memory: a quarter of the difference would show one copy of the model."""
    side, peaks, sizes = 512, {}, {}
    for layers in (4, 16):
        folder = tmp_path / str(layers)
        for name, seed in (("base", 0), ("tuned", 1)):
            generator = torch.Generator().manual_seed(seed)
            weights = {
                f"model.layers.{layer}.mlp.{leaf}.weight": torch.randn(side, 4 * side, generator=generator)
                for layer in range(layers) for leaf in ("up_proj", "gate_proj")
            }  # fmt: skip
            sizes[layers] = sum(tensor.nbytes for tensor in weights.values())
            write_checkpoint(folder / name, weights)
        words = [command, folder / "tuned", "-r", "4"] + (["--base", folder / "base"] if command == "extract" else [])
        peaks[layers] = least_memory(*words, output=folder / "out")
        shutil.rmtree(folder)
    assert peaks[16] - peaks[4] < (sizes[16] - sizes[4]) / 4


def test_the_card_says_how_to_load_it_and_shows_the_ranks(basis: Basis, tuned: Path, tmp_path: Path) -> None:
    given = ["--energy", "0.9", "--target-modules", ".*(q|v)_proj"]
    result = basis("extract", tuned / "tuned", "--base", tuned / "base", *given, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    card = (tmp_path / "out" / "README.md").read_text()
    ranks = {name: module.rank for name, module in read_report(tmp_path / "out").adapter.modules.items()}
    assert 'PeftModel.from_pretrained(base, "out", is_trainable=True)' in card
    assert "--energy 0.9" in card
    assert "--target-modules '.*(q|v)_proj'" in card
    shown = (tmp_path / "out" / "ranks.svg").exists()
    assert shown == (len(set(ranks.values())) > 1) == ("](ranks.svg)" in card)
