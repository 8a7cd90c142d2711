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
from torch import Tensor
from typer.testing import Result

import basiscli
from basiscli.checkpoints.writer import JOURNAL
from tests.conftest import Tensors, basis_process, make_tensors, read_checkpoint, snapshot, write_checkpoint
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
        "adapter_config.json", "adapter_model.safetensors", "basis_report.json"
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


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_the_folder_around_both_parts_is_no_model(model: Path, tmp_path: Path, basis: Basis, command: str) -> None:
    basiscli.init(model, rank=4, output=tmp_path / "out")
    shown = basis(command, tmp_path / "out")
    assert shown.exit_code == 3
    assert "no weights here" in shown.stderr
    assert "give the folder of a checkpoint or an adapter" in shown.stderr


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
        words = [folder / "tuned", "-r", "4", "--workers", "1", "-o", folder / "out", "--json"]
        words += ["--base", folder / "base"] if command == "extract" else []
        done = basis_process(command, *words, OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
        peaks[layers] = json.loads(done.stdout)["cost"]["peak_memory_bytes"]
        shutil.rmtree(folder)
    assert peaks[16] - peaks[4] < (sizes[16] - sizes[4]) / 4
