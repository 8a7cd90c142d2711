"""The command line as its users meet it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

import basiscli
from tests.conftest import add, basis_process, make_tensors, write_checkpoint

Basis = Callable[..., Result]
NO_TORCH = """
import sys
from basiscli.app import app
try:
    app()
finally:
    heavy = [m for m in ("torch", "transformers", "peft", "numpy") if m in sys.modules]
    print("imported:", heavy, file=sys.stderr)
"""


def test_the_plain_command_works_where_the_models_name_their_base(tmp_path: Path) -> None:
    base = make_tensors(0)
    write_checkpoint(tmp_path / "base", base)
    card = f"---\nbase_model: {tmp_path / 'base'}\nlicense: mit\n---\n"
    for seed, name in enumerate("abc", start=1):
        write_checkpoint(tmp_path / name, add(base, make_tensors(seed)), card=card)
    done = basis_process("merge", "a", "b", "c", "--method", "ortho", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "merge-ortho")
    assert basiscli.verify(tmp_path / "merge-ortho").checked_digests


@pytest.mark.parametrize(
    "words",
    [["--help"], ["merge", "--help"], ["inspect", "a"], ["verify", "a"], ["methods"]]
    + [["merge", "a", "b", "--base", "base", "-m", method, "--dry-run"] for method in ("ortho", "linear")],
)
def test_looking_and_planning_import_no_torch(family: dict[str, Path], tmp_path: Path, words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, *words], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "imported: []" in done.stderr


def test_a_dry_run_writes_nothing_and_lists_every_tensor(family: dict[str, Path], tmp_path: Path, basis: Basis) -> None:
    before = sorted(tmp_path.rglob("*"))
    result = basis("merge", family["a"], family["b"], "-m", "linear", "-o", tmp_path / "out", "--dry-run", "--json")
    plan = json.loads(result.stdout)
    assert {tensor["name"] for tensor in plan["tensors"]} == set(make_tensors(0))
    assert plan["write_bytes"] == sum(file["bytes"] for file in plan["files"])
    assert sorted(tmp_path.rglob("*")) == before
    shown = basis("merge", family["a"], family["b"], "-m", "linear", "-o", tmp_path / "out", "--dry-run")
    assert "model.safetensors" in shown.stdout
    assert "memory for tensors" in shown.stdout


def test_the_planned_size_is_the_written_size(family: dict[str, Path], tmp_path: Path) -> None:
    options = {"method": "ortho", "base": family["base"], "output": tmp_path / "out", "shard_size": "3kB"}
    plan = basiscli.plan_merge([family["a"], family["b"]], **options)
    written = basiscli.merge([family["a"], family["b"]], **options).path
    sizes = {file.name: file.stat().st_size for file in written.glob("*.safetensors")}
    assert sizes == {shard.file: shard.nbytes for shard in plan.layout.shards}


def test_json_is_one_document_on_stdout(family: dict[str, Path], tmp_path: Path) -> None:
    words = ["merge", family["a"], family["b"], "--base", family["base"], "-m", "ortho", "-o", tmp_path / "out"]
    done = basis_process(*words, "--json")
    document = json.loads(done.stdout)
    assert document["output"] == str(tmp_path / "out")
    assert document["numbers"]["lambda"] > 0
    assert document["task_vectors"]["norms"]


def test_quiet_leaves_the_path_alone(family: dict[str, Path], tmp_path: Path) -> None:
    done = basis_process("merge", family["a"], family["b"], "-m", "linear", "-o", tmp_path / "out", "--quiet")
    assert (done.stdout, done.stderr) == (f"{tmp_path / 'out'}\n", "")


def test_no_colour_codes_in_pipes(family: dict[str, Path], tmp_path: Path) -> None:
    done = basis_process("merge", family["a"], family["b"], "-m", "nosuch", "-o", tmp_path / "out")
    assert done.returncode == 2
    assert "\x1b" not in done.stdout + done.stderr


def test_a_config_file_gives_defaults_that_options_override(
    family: dict[str, Path], tmp_path: Path, basis: Basis
) -> None:
    config = tmp_path / "merge.yaml"
    config.write_text(f"method: linear\noutput: {tmp_path / 'from-file'}\nshard-size: 2kB\n")
    assert basis("merge", family["a"], family["b"], "--config", config).exit_code == 0
    assert (tmp_path / "from-file" / "model.safetensors.index.json").is_file()
    assert basis("merge", family["a"], family["b"], "--config", config, "-o", tmp_path / "given").exit_code == 0
    assert (tmp_path / "given").is_dir()
    config.write_text("metod: linear\n")
    refused = basis("merge", family["a"], family["b"], "--config", config)
    assert refused.exit_code == 2
    assert "metod" in refused.stderr


def test_inspect_shows_what_the_headers_say(family: dict[str, Path], basis: Basis) -> None:
    shown = basis("inspect", family["a"], "--tensors").stdout
    assert "LlamaForCausalLM" in shown
    assert "model.layers.0.mlp.up_proj.weight" in shown
    document = json.loads(basis("inspect", family["a"], "--json").stdout)
    expected = sum(tensor.numel() for tensor in make_tensors(0).values())
    assert document["total"]["parameters"] == expected
    assert "tensors" not in document


def test_layers_are_listed_in_their_natural_order(family: dict[str, Path]) -> None:
    names = [tensor.name for tensor in basiscli.inspect(family["a"]).tensors]
    assert names.index("model.layers.2.empty.weight") < names.index("model.layers.10.conv.weight")


def test_diff_of_a_model_with_itself_is_nothing(family: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(family["a"], tmp_path / "copy")
    assert basiscli.diff(family["a"], tmp_path / "copy").identical


def test_diff_measures_each_tensor(family: dict[str, Path], basis: Basis) -> None:
    found = basiscli.diff(family["base"], family["a"])
    base, a = make_tensors(0), add(make_tensors(0), make_tensors(1))
    for tensor in found.tensors:
        x, y = base[tensor.name].double(), a[tensor.name].double()
        assert tensor.distance == pytest.approx(float((x - y).norm()), rel=1e-6)
        assert tensor.norm_a == pytest.approx(float(x.norm()), rel=1e-6)
    assert not found.identical
    shown = basis("diff", family["base"], family["a"], "--top", "1")
    assert "more (--top 0 shows all)" in shown.stdout


def test_verify_finds_a_flipped_bit(family: dict[str, Path], tmp_path: Path, basis: Basis) -> None:
    out = basiscli.merge([family["a"], family["b"]], method="linear", output=tmp_path / "out").path
    assert basis("verify", out).exit_code == 0
    weights = bytearray((out / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (out / "model.safetensors").write_bytes(weights)
    refused = basis("verify", out)
    assert refused.exit_code == 3
    assert "digest differs" in refused.stderr
    assert "tensor:" in refused.stderr


def test_verify_says_when_there_is_nothing_to_check_against(family: dict[str, Path], basis: Basis) -> None:
    assert "structure only" in basis("verify", family["a"]).stdout


def test_methods_are_listed_and_shown(basis: Basis) -> None:
    assert "ortho" in basis("methods").stdout
    shown = basis("methods", "show", "ortho").stdout
    assert "alpha" in shown
    assert "2501.09522" in shown
    assert "did you mean 'ortho'" in basis("methods", "show", "orhto").stderr


def test_a_bug_says_so_and_exits_with_one(
    family: dict[str, Path], tmp_path: Path, basis: Basis, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr("basiscli.commands.merge.api._plan", broken)
    result = basis("merge", family["a"], family["b"], "-m", "linear", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "this is a bug" in result.stderr


def test_the_version_is_the_packages(basis: Basis) -> None:
    assert basis("--version").stdout.strip() == f"basis {basiscli.__version__}"
