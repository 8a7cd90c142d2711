"""Every bad input of a merge: what it says, how it exits, and that it touches nothing."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pickle
import re
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import Result

from tests.conftest import basis_process, full_disk, make_tensors, read_checkpoint, snapshot, write_checkpoint

USAGE, INPUT, HUB, RESOURCE = 2, 3, 5, 6
EMBEDDING = "model.embed_tokens.weight"
MATRIX = "model.layers.0.mlp.up_proj.weight"
SQUARE = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"

Basis = Callable[..., Result]
Family = dict[str, Path]
Refuse = Callable[..., Result]
both_methods = pytest.mark.parametrize("method", ["linear", "ortho"])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def refuse(basis: Basis, tmp_path: Path, out: Path) -> Refuse:
    """Return a function that runs a merge and checks that it is refused as it should be, and changes nothing."""

    def check(
        words: Sequence[str | Path],
        code: int,
        cause: str,
        remedy: str = "",
        *,
        file: Path | None = None,
        tensor: str | None = None,
    ) -> Result:
        place = Path(words[words.index("-o") + 1]) if "-o" in words else out
        unfinished = place.with_name(f"{place.name}.partial")
        existed, before = os.path.lexists(place), files_of(tmp_path, unfinished)
        result = basis("merge", *words, "-o", place)
        message = result.stderr
        assert result.exit_code == code, message
        assert message.startswith("error: ")
        assert cause in message
        assert file is None or f"\n  file: {file}" in message
        assert tensor is None or f"\n  tensor: {tensor}\n" in message
        assert re.search(f"^  to do: .*{re.escape(remedy)}", message, re.MULTILINE), message
        assert os.path.lexists(place) == existed
        assert files_of(tmp_path, unfinished) == before
        assert code != INPUT or not unfinished.exists()  # nothing to go on with
        return result

    return check


def files_of(folder: Path, unfinished: Path) -> dict[str, bytes]:
    """Return every file of a test but those of an interrupted run."""
    return {name: raw for name, raw in snapshot(folder).items() if not name.startswith(f"{unfinished}{os.sep}")}


def models(family: Family, method: str = "linear") -> list[str | Path]:
    """Return the words of a merge of `a` and `b` that works."""
    base = ["--base", family["base"]] if method == "ortho" else []
    return [family["a"], family["b"], "-m", method, *base]


def weights_of(model: Path) -> Path:
    return model / "model.safetensors"


def read_head(file: Path) -> tuple[dict[str, Any], bytes]:
    """Return a file's header as a table, and its data."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def change_head(file: Path, name: str, **fields: Any) -> None:
    """Let a header say something else about a tensor."""
    table, data = read_head(file)
    table[name] |= fields
    head = json.dumps(table).encode()
    file.write_bytes(struct.pack("<Q", len(head)) + head + data)


def change_json(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def change_tensors(model: Path, **changes: Tensor | None) -> None:
    """Replace tensors of a single-file checkpoint; None removes one."""
    table = {name: tensor for name, tensor in (read_checkpoint(model) | changes).items() if tensor is not None}
    save_file(table, weights_of(model), {"format": "pt"})


def spoil(model: Path, name: str, value: float) -> None:
    """Put one number into the middle of a tensor."""
    tensor = read_checkpoint(model)[name].clone()
    tensor.view(-1)[tensor.numel() // 2] = value
    change_tensors(model, **{name: tensor})


def sharded(family: Family, shards: int = 3) -> Path:
    """Write model `b` anew in several shards."""
    tensors = read_checkpoint(family["b"])
    weights_of(family["b"]).unlink()
    return write_checkpoint(family["b"], tensors, shards=shards)


def shard(number: int, total: int = 3) -> str:
    return f"model-{number:05d}-of-{total:05d}.safetensors"


def change_index(model: Path, **places: str) -> Path:
    """Let an index say that tensors are elsewhere."""
    index = model / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"] |= places
    index.write_text(json.dumps(table))
    return index


# Damaged files --------------------------------------------------------------------------------------------------------


def test_a_truncated_shard(family: Family, refuse: Refuse) -> None:
    file = sharded(family) / shard(2)
    entries = {name: entry for name, entry in read_head(file)[0].items() if name != "__metadata__"}
    last = max(entries, key=lambda name: entries[name]["data_offsets"][1])
    file.write_bytes(file.read_bytes()[:-1])
    refuse(models(family), INPUT, "truncated", "download or save", file=file, tensor=last)


@pytest.mark.parametrize("size", [0, 7, 100])
def test_a_file_that_ends_in_its_header(family: Family, refuse: Refuse, size: int) -> None:
    file = weights_of(family["b"])
    file.write_bytes(file.read_bytes()[:size])
    refuse(models(family), INPUT, "not a safetensors file", "download or save", file=file)


def test_a_corrupt_header(family: Family, refuse: Refuse) -> None:
    file = weights_of(family["b"])
    raw = bytearray(file.read_bytes())
    raw[20] = 0xFF
    file.write_bytes(raw)
    refuse(models(family), INPUT, "not valid JSON", "download or save", file=file)


def test_a_header_that_lies_about_offsets(family: Family, refuse: Refuse) -> None:
    file = weights_of(family["b"])
    begin, end = read_head(file)[0][NORM]["data_offsets"]
    change_head(file, NORM, data_offsets=[begin - 4, end - 4])
    refuse(models(family), INPUT, "the header lies", "download or save", file=file, tensor=NORM)


def test_a_header_that_lies_about_sizes(family: Family, refuse: Refuse) -> None:
    file = weights_of(family["b"])
    change_head(file, MATRIX, shape=[2**40, 2**40])
    refuse(models(family), INPUT, "the header lies", "download or save", file=file, tensor=MATRIX)


def test_a_file_that_ends_while_it_is_read(family: Family, refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("basiscli.checkpoints.views.os.preadv", lambda *_: 0)
    refuse([*models(family), "--workers", "1"], INPUT, "became shorter", file=weights_of(family["a"]))


def test_a_disk_that_gives_up_while_it_is_read(family: Family, refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("basiscli.checkpoints.views.os.preadv", fail)
    refuse([*models(family), "--workers", "1"], INPUT, "Input/output error", file=weights_of(family["a"]))


# Shards and indexes ---------------------------------------------------------------------------------------------------


def test_an_index_that_names_a_missing_shard(family: Family, refuse: Refuse) -> None:
    model = sharded(family)
    (model / shard(2)).unlink()
    index = model / "model.safetensors.index.json"
    refuse(models(family), INPUT, f"names {shard(2)}", "download the checkpoint", file=index)


@pytest.mark.parametrize("place", ["parent", "absolute", "subfolder", "folder itself", "other kind"])
def test_an_index_that_points_elsewhere(family: Family, refuse: Refuse, tmp_path: Path, place: str) -> None:
    model = sharded(family)
    (model / "sub").mkdir()
    for elsewhere in (tmp_path, model / "sub"):
        shutil.copy(model / shard(1), elsewhere / "x.safetensors")
    path = {
        "parent": "../x.safetensors",
        "absolute": str(tmp_path / "x.safetensors"),
        "subfolder": "sub/x.safetensors",
        "folder itself": ".",
        "other kind": "config.json",
    }[place]
    index = change_index(model, **{NORM: path})
    refuse(models(family), INPUT, f"the index names '{path}'", file=index)


def test_an_index_without_a_weight_map(family: Family, refuse: Refuse) -> None:
    index = sharded(family) / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": [NORM]}))
    refuse(models(family), INPUT, "no weight_map", file=index)


def test_an_index_that_is_no_json(family: Family, refuse: Refuse) -> None:
    index = sharded(family) / "model.safetensors.index.json"
    index.write_text("{")
    refuse(models(family), INPUT, "not valid JSON", "restore the file", file=index)


@pytest.mark.parametrize("name", [NORM, "model.no_such.weight"])
def test_an_index_that_places_a_tensor_where_it_is_not(family: Family, refuse: Refuse, name: str) -> None:
    model = sharded(family)
    wrong = next(shard(n) for n in (1, 2, 3) if name not in read_head(model / shard(n))[0])
    change_index(model, **{name: wrong})
    cause = "the index says the tensor is in this file"
    refuse(models(family), INPUT, cause, file=model / wrong, tensor=name)


def test_a_tensor_in_two_shards_that_the_index_leaves_out(family: Family, refuse: Refuse) -> None:
    model = sharded(family)
    for n in (2, 3):
        file = model / shard(n)
        save_file({**load_file(file), "model.twice.weight": torch.ones(3)}, file, {"format": "pt"})
    cause = f"the tensor is also in {shard(2)}"
    refuse(models(family), INPUT, cause, file=model / shard(3), tensor="model.twice.weight")


def test_a_missing_shard_where_there_is_no_index(family: Family, refuse: Refuse) -> None:
    model = sharded(family)
    (model / shard(2)).unlink()
    (model / "model.safetensors.index.json").unlink()
    refuse(models(family), INPUT, "shard 2 of 3 is missing", "download the checkpoint", file=model)


def test_several_weights_files_that_no_index_explains(family: Family, refuse: Refuse) -> None:
    model = family["b"]
    weights_of(model).rename(model / "one.safetensors")
    shutil.copy(model / "one.safetensors", model / "two.safetensors")
    cause = "several weights files"
    refuse(models(family), INPUT, cause, "give the path of one", file=model)


# Models that do not belong together -----------------------------------------------------------------------------------


def test_shapes_that_differ(family: Family, refuse: Refuse) -> None:
    change_tensors(family["b"], **{MATRIX: torch.zeros(40, 32)})
    cause = f"shapes differ: [40, 32] in {family['b']}, [40, 24] in {family['a']}"
    remedy = "models of one size and architecture"
    refuse(models(family), INPUT, cause, remedy, file=family["b"], tensor=MATRIX)


@pytest.mark.parametrize("name", [EMBEDDING, "lm_head.weight"])
def test_vocabularies_that_differ(family: Family, refuse: Refuse, name: str) -> None:
    change_tensors(family["a"], **{name: torch.zeros(50, 24)})
    change_tensors(family["b"], **{name: torch.zeros(53, 24)})
    cause, remedy = f"shapes differ: [53, 24] in {family['b']}", "vocabularies differ"
    refuse(models(family), INPUT, cause, remedy, file=family["b"], tensor=name)


def test_a_wider_layer_is_not_called_another_vocabulary(family: Family, refuse: Refuse) -> None:
    change_tensors(family["b"], **{MATRIX: torch.zeros(48, 24)})
    remedy = "models of one size and architecture"
    refuse(models(family), INPUT, "shapes differ", remedy, file=family["b"], tensor=MATRIX)


@both_methods
def test_a_parameter_that_the_last_model_lacks(family: Family, refuse: Refuse, method: str) -> None:
    change_tensors(family["b"], **{NORM: None})
    cause, remedy = "b lacks a parameter that", "--allow-missing"
    refuse(models(family, method), INPUT, cause, remedy, file=family["b"], tensor=NORM)


@both_methods
def test_a_parameter_that_only_the_last_model_has(family: Family, refuse: Refuse, method: str) -> None:
    change_tensors(family["b"], **{"model.more.weight": torch.ones(3)})
    cause, remedy = f"{family['b']} has a parameter that", "--allow-missing"
    refuse(models(family, method), INPUT, cause, remedy, file=family["b"], tensor="model.more.weight")


@both_methods
def test_allow_missing_counts_a_lacking_parameter_as_unchanged(
    family: Family, basis: Basis, out: Path, method: str
) -> None:
    change_tensors(family["b"], **{NORM: None})
    before = snapshot(*family.values())
    result = basis("merge", *models(family, method), "--allow-missing", "-o", out)
    assert result.exit_code == 0, result.stderr
    taken = "base" if method == "ortho" else "a"
    assert f"note: {NORM} is missing in b: taken from {taken}" in result.stderr
    assert read_checkpoint(out).keys() == make_tensors(0).keys()
    if method == "linear":
        assert torch.equal(read_checkpoint(out)[NORM], read_checkpoint(family["a"])[NORM])
    assert snapshot(*family.values()) == before


@both_methods
def test_allow_missing_leaves_a_surplus_parameter_out(family: Family, basis: Basis, out: Path, method: str) -> None:
    change_tensors(family["b"], **{"model.more.weight": torch.ones(3)})
    result = basis("merge", *models(family, method), "--allow-missing", "-o", out)
    assert result.exit_code == 0, result.stderr
    assert "note: model.more.weight is only in b: left out" in result.stderr
    assert "model.more.weight" not in read_checkpoint(out)


@pytest.mark.parametrize("key", ["architectures", "model_type"])
def test_different_architectures(family: Family, refuse: Refuse, key: str) -> None:
    other = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    change_json(family["b"] / "config.json", **{key: other[key]})
    config = family["b"] / "config.json"
    refuse(models(family), INPUT, "different architectures", "one architecture", file=config)


# Numbers --------------------------------------------------------------------------------------------------------------


@both_methods
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [SQUARE, NORM])
def test_a_nan_or_an_inf(family: Family, refuse: Refuse, method: str, value: float, name: str) -> None:
    spoil(family["b"], name, value)
    cause, remedy = f"{family['b']} has a NaN or Inf", "--allow-nonfinite"
    refuse(models(family, method), INPUT, cause, remedy, file=weights_of(family["b"]), tensor=name)


@both_methods
def test_a_nan_in_a_shard_is_found_in_its_file(family: Family, refuse: Refuse, method: str) -> None:
    spoil(family["b"], NORM, float("nan"))
    model = sharded(family)
    (file,) = (model / shard(n) for n in (1, 2, 3) if NORM in read_head(model / shard(n))[0])
    cause, remedy = "has a NaN or Inf", "--allow-nonfinite"
    refuse(models(family, method), INPUT, cause, remedy, file=file, tensor=NORM)


def test_a_nan_in_the_base(family: Family, refuse: Refuse) -> None:
    spoil(family["base"], SQUARE, float("nan"))
    cause, remedy = f"{family['base']} has a NaN or Inf", "--allow-nonfinite"
    refuse(models(family, "ortho"), INPUT, cause, remedy, file=weights_of(family["base"]), tensor=SQUARE)


@both_methods
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [SQUARE, NORM])
def test_allow_nonfinite_goes_on(family: Family, basis: Basis, out: Path, method: str, value: float, name: str) -> None:
    spoil(family["b"], name, value)
    before = snapshot(*family.values())
    words = [family["a"], family["b"], "-m", method, "--base", family["base"], "-o", out]
    result = basis("merge", *words, "--allow-nonfinite", "--json")
    assert result.exit_code == 0, result.stderr
    assert not read_checkpoint(out)[name].isfinite().all()
    json.loads(result.stdout, parse_constant=pytest.fail)  # JSON knows no NaN
    verified = basis("verify", out)
    assert verified.exit_code == 0, verified.stderr
    assert snapshot(*family.values()) == before


@both_methods
def test_an_overflow_of_the_storage_dtype(family: Family, refuse: Refuse, out: Path, method: str) -> None:
    for name in ("a", "b"):
        spoil(family[name], MATRIX, 1e6)
    cause, remedy = "the merged values do not fit F16", "a wider --dtype"
    refuse([*models(family, method), "--dtype", "f16"], INPUT, cause, remedy, file=out, tensor=MATRIX)


# Quantised ------------------------------------------------------------------------------------------------------------


def test_a_config_that_says_quantised(family: Family, refuse: Refuse) -> None:
    change_json(family["b"] / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    cause, remedy = f"{family['b']} is quantised", "the unquantised checkpoint"
    refuse(models(family), INPUT, cause, remedy, file=family["b"] / "config.json")


@pytest.mark.parametrize(("dtype", "word"), [(torch.int8, "I8"), (torch.uint8, "U8"), (torch.float8_e4m3fn, "F8_E4M3")])
@pytest.mark.parametrize("where", [["a"], ["b"], ["a", "b"]])
def test_quantised_weights(family: Family, refuse: Refuse, dtype: torch.dtype, word: str, where: list[str]) -> None:
    for name in where:
        change_tensors(family[name], **{MATRIX: torch.zeros(40, 24).to(dtype)})
    cause, remedy = f"holds quantised weights ({word})", "the unquantised checkpoint"
    refuse(models(family), INPUT, cause, remedy, file=family[where[0]], tensor=MATRIX)


# Where the output goes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "inside"),
    [("a", "a"), ("a/merged", "a"), ("b/deep/down", "b"), ("base", "base"), ("base/merged", "base"), ("b/../a/m", "a")],
)
def test_an_output_inside_an_input(family: Family, refuse: Refuse, tmp_path: Path, place: str, inside: str) -> None:
    words = [*models(family, "ortho"), "-o", tmp_path / place]
    refuse(words, USAGE, "the output would lie inside an input", "choose another -o", file=family[inside])


def test_an_output_inside_an_input_by_a_link(family: Family, refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(family["a"])
    words = [*models(family), "-o", tmp_path / "link" / "merged"]
    refuse(words, USAGE, "inside an input", "choose another -o", file=family["a"])


def test_an_output_that_holds_an_input(family: Family, refuse: Refuse, tmp_path: Path) -> None:
    words = [*models(family), "-o", tmp_path]
    refuse(words, USAGE, "the output would hold an input", "choose another -o")


def test_an_output_that_is_a_file(family: Family, refuse: Refuse, out: Path) -> None:
    out.write_text("mine")
    for more in ([], ["--overwrite"]):
        refuse([*models(family), *more], USAGE, "the output is a file", "choose another -o", file=out)


def test_an_output_that_exists(family: Family, refuse: Refuse, basis: Basis, out: Path) -> None:
    assert basis("merge", *models(family), "-o", out).exit_code == 0
    refuse(models(family), USAGE, "the output exists", "--overwrite", file=out)


def test_overwrite_replaces_an_earlier_output(family: Family, basis: Basis, out: Path) -> None:
    assert basis("merge", *models(family), "-o", out).exit_code == 0
    before, inputs = snapshot(out), snapshot(*family.values())
    result = basis("merge", *models(family), "--weights", "3,1", "-o", out, "--overwrite")
    assert result.exit_code == 0, result.stderr
    after = snapshot(out)
    assert after.keys() == before.keys()
    assert after[str(weights_of(out))] != before[str(weights_of(out))]
    assert sorted(path.name for path in out.parent.iterdir()) == ["a", "b", "base", "c", "out"]
    assert snapshot(*family.values()) == inputs


def test_overwrite_spares_what_basis_did_not_write(family: Family, refuse: Refuse, out: Path) -> None:
    write_checkpoint(out, make_tensors(7))
    cause, remedy = "was not written by basis", "choose another -o"
    refuse([*models(family), "--overwrite"], USAGE, cause, remedy, file=out)


def test_a_refused_overwrite_leaves_the_earlier_output(family: Family, refuse: Refuse, basis: Basis, out: Path) -> None:
    assert basis("merge", *models(family), "-o", out).exit_code == 0
    spoil(family["b"], NORM, float("nan"))
    words = [*models(family), "--overwrite"]
    refuse(words, INPUT, "NaN or Inf", "--allow-nonfinite", file=weights_of(family["b"]), tensor=NORM)


def test_an_input_at_the_place_of_unfinished_work_is_not_touched(
    family: Family, basis: Basis, tmp_path: Path, out: Path
) -> None:
    model = family["a"].rename(tmp_path / "out.partial")
    before = snapshot(tmp_path)
    result = basis("merge", model, family["b"], "-m", "linear", "-o", out)
    assert snapshot(tmp_path) == before
    assert result.exit_code == USAGE
    assert "to do: " in result.stderr


@pytest.mark.parametrize(("suffix", "more"), [("partial", []), ("replaced", ["--overwrite"])])
def test_a_folder_of_somebody_else_beside_the_output_is_not_touched(
    family: Family, basis: Basis, tmp_path: Path, out: Path, suffix: str, more: list[str]
) -> None:
    assert basis("merge", *models(family), "-o", out if more else tmp_path / "other").exit_code == 0
    mine = tmp_path / f"out.{suffix}" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("years of work")
    basis("merge", *models(family), "-o", out, *more)
    assert mine.is_file()
    assert mine.read_text() == "years of work"


# The base -------------------------------------------------------------------------------------------------------------


def test_no_base_where_one_is_needed(family: Family, refuse: Refuse) -> None:
    words = [family["a"], family["b"], "-m", "ortho"]
    cause = f"ortho needs the base, and {family['a']}, {family['b']} does not name one"
    refuse(words, USAGE, cause, "give it with --base")


def name_base(model: Path, base: str | Path) -> None:
    (model / "README.md").write_text(f"---\nbase_model: {base}\n---\n")


def test_models_that_name_different_bases(family: Family, refuse: Refuse) -> None:
    name_base(family["a"], family["base"])
    name_base(family["b"], family["c"])
    words = [family["a"], family["b"], "-m", "ortho"]
    result = refuse(words, USAGE, "the inputs name different bases", "--base")
    assert f"{family['b']}: {family['c']}" in result.stderr


def test_a_named_base_that_is_not_there(family: Family, refuse: Refuse) -> None:
    for name in ("a", "b"):
        name_base(family[name], "./gone")
    words = [family["a"], family["b"], "-m", "ortho"]
    refuse(words, INPUT, "names './gone' as its base", "--base", file=family["a"])


@pytest.mark.parametrize("option", ["--base", "--onto", None])
def test_a_folder_that_does_not_exist(family: Family, refuse: Refuse, tmp_path: Path, option: str | None) -> None:
    gone = tmp_path / "gone"
    words = [*models(family), *([option] if option else []), gone]
    refuse(words, INPUT, f"no such model: {gone}", "give a folder")


def test_a_model_that_only_the_hub_could_have(family: Family, tmp_path: Path, out: Path) -> None:
    before = snapshot(tmp_path)
    words = [family["a"], family["b"], "-m", "linear", "--base", "nobody/nothing", "-o", out]
    done = basis_process("merge", *words, "--json", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub"))
    assert done.returncode == HUB, done.stderr
    assert "nobody/nothing is not in the cache, and the Hub cannot be reached" in done.stderr
    assert "  to do: connect" in done.stderr
    assert json.loads(done.stdout)["error"] == "HubError"
    assert not out.exists()
    assert {name: raw for name, raw in snapshot(tmp_path).items() if name in before} == before


# The command ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "words", "cause", "remedy"),
    [
        ("liner", [], "no merge method 'liner'", "did you mean 'linear'?"),
        ("xyz", [], "no merge method 'xyz'", "known: arcee_fusion, "),
        ("ortho", ["-p", "aplha=0.5"], "ortho has no parameter 'aplha'", "did you mean 'alpha'?"),
        ("ortho", ["-p", "alpha=1.5"], "parameter alpha=1.5 of ortho", "basis methods show ortho"),
        ("ortho", ["-p", "alpha=-0.1"], "parameter alpha=-0.1 of ortho", "basis methods show ortho"),
        ("ortho", ["-p", "alpha=nan"], "parameter alpha='nan' of ortho", "basis methods show ortho"),
        ("ortho", ["-p", "alpha=NaN"], "parameter alpha=nan of ortho", "basis methods show ortho"),
        ("ortho", ["-p", "alpha=x"], "parameter alpha='x' of ortho", "basis methods show ortho"),
        ("ortho", ["-p", "alpha="], "parameter alpha='' of ortho", "basis methods show ortho"),
        ("ortho", ["-p", "alpha"], "not a parameter: 'alpha'", "write -p name=value"),
        ("ortho", ["-p", "=1"], "not a parameter: '=1'", "write -p name=value"),
        ("ortho", ["--weights", "1,2"], "ortho takes no weights", "leave out --weights"),
        ("linear", ["-p", "normalize=perhaps"], "parameter normalize='perhaps'", "basis methods show linear"),
        ("linear", ["--weights", "1"], "1 weights for 2 models", "one number a model"),
        ("linear", ["--weights", "1,2,3"], "3 weights for 2 models", "one number a model"),
        ("linear", ["--weights", "1,x"], "not a list of numbers: '1,x'", "write --weights"),
        ("linear", ["--weights", ""], "not a list of numbers: ''", "write --weights"),
        ("linear", ["--weights", "1,-1"], "the weights sum to zero", "normalize=false"),
        ("linear", ["--weights", "nan,1"], "nan", "--weights"),
        ("linear", ["--weights", "inf,1"], "inf", "--weights"),
        ("linear", ["--dtype", "int8"], "unknown dtype 'int8'", "bf16"),
        ("linear", ["--dtype", "bfloat61"], "unknown dtype 'bfloat61'", "did you mean 'bfloat16'?"),
        ("linear", ["--shard-size", "big"], "not a size: 'big'", "5GB"),
        ("linear", ["--shard-size", "0"], "not a size: '0'", "5GB"),
        ("linear", ["--shard-size", "1.2.3GB"], "not a size: '1.2.3GB'", "5GB"),
        ("linear", ["--shard-size", "5XB"], "not a size: '5XB'", "5GB"),
        pytest.param("linear", ["--shard-size", "9" * 400], "not a size: '999", "5GB", id="endless size"),
        ("linear", ["--workers", "0"], "0 workers", "at least one"),
        ("linear", ["--workers", "-3"], "-3 workers", "at least one"),
    ],
)
def test_a_word_that_is_wrong(
    family: Family, refuse: Refuse, method: str, words: list[str], cause: str, remedy: str
) -> None:
    refuse([*models(family, "ortho")[:2], "-m", method, "--base", family["base"], *words], USAGE, cause, remedy)


@pytest.mark.parametrize("value", ["nan", "NaN", "Infinity", "1e400", "x"])
def test_a_parameter_without_limits_is_still_a_number(family: Family, refuse: Refuse, value: str) -> None:
    words = [family["a"], "-m", "task_arithmetic", "--base", family["base"], "-p", f"lambda={value}"]
    refuse(words, USAGE, "parameter lambda=", "basis methods show task_arithmetic")


def test_weights_that_sum_to_zero_but_for_rounding(family: Family, refuse: Refuse) -> None:
    words = [*(family[name] for name in "abc"), "-m", "linear", "--weights", "0.1,0.2,-0.3"]
    refuse(words, USAGE, "the weights sum to zero", "normalize=false")


def test_a_weight_that_cancels_the_earlier_merge(family: Family, refuse: Refuse, basis: Basis, tmp_path: Path) -> None:
    assert basis("merge", *models(family), "-o", tmp_path / "ab").exit_code == 0
    words = [family["c"], "-m", "linear", "--onto", tmp_path / "ab", "--weights", "-2"]
    refuse(words, USAGE, "the weights sum to zero")


def test_a_single_model_is_nothing_to_merge(family: Family, refuse: Refuse) -> None:
    refuse([family["a"], "-m", "linear"], USAGE, "nothing to merge", "give two models or more")


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        ([], "--method"),
        (["-m"], "requires an argument"),
        (["-m", "linear", "--no-such-option"], "No such option"),
        (["-m", "linear", "--seed", "x"], "--seed"),
        (["-m", "linear", "--workers", "x"], "--workers"),
    ],
)
def test_a_command_that_cannot_be_read(
    family: Family, basis: Basis, tmp_path: Path, words: list[str], cause: str
) -> None:
    before = snapshot(tmp_path)
    result = basis("merge", family["a"], family["b"], "-o", tmp_path / "out", *words)
    assert result.exit_code == USAGE
    assert cause in result.stderr
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("device", ["cuda:99", "cuda:x", "tpu", "meta"])
def test_a_device_that_is_not_there(family: Family, refuse: Refuse, out: Path, device: str) -> None:
    refuse([*models(family), "--device", device], RESOURCE, f"no device '{device}'", "--device cpu")
    assert not out.with_name("out.partial").exists()  # found before room is made for the whole model


def test_json_is_one_document_with_the_error(family: Family, refuse: Refuse) -> None:
    file = weights_of(family["b"])
    change_head(file, MATRIX, dtype="F64")
    result = refuse([*models(family), "--json"], INPUT, "the header lies", "download", file=file, tensor=MATRIX)
    document = json.loads(result.stdout)
    assert document["error"] == "InputError"
    assert document["exit_code"] == INPUT
    assert (document["file"], document["tensor"]) == (str(file), MATRIX)
    assert "the header lies" in document["what"]
    assert "download" in document["remedy"]


def test_json_holds_whatever_an_input_says(family: Family, refuse: Refuse) -> None:
    change_json(family["b"] / "config.json", model_type="\ud800")
    config = family["b"] / "config.json"
    words = [*models(family), "--json"]
    result = refuse(words, INPUT, "different architectures", "one architecture", file=config)
    assert json.loads(result.stdout)["file"] == str(config)


# Configurations, cards and code ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"{", "not valid JSON"),
        (b"\xff{}", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"[" * 10**5, "not valid"),
    ],
    ids=["cut off", "not UTF-8", "a list", "deep"],
)
def test_a_config_that_is_no_json(family: Family, refuse: Refuse, content: bytes, cause: str) -> None:
    config = family["b"] / "config.json"
    config.write_bytes(content)
    refuse(models(family), INPUT, cause, "restore the file", file=config)


@pytest.mark.parametrize(
    "card", ["base_model: [", "date: 2024-02-30", "[" * 10**4, "n: " + "1" * 5000, "- a list"],
    ids=["broken", "no such day", "deep", "endless number", "a list"],
)  # fmt: skip
def test_a_broken_card_is_no_reason_to_refuse(family: Family, basis: Basis, out: Path, card: str) -> None:
    (family["b"] / "README.md").write_text(f"---\n{card}\n---\n")
    result = basis("merge", *models(family), "-o", out)
    assert result.exit_code == 0, result.stderr


def test_a_name_with_many_digits_is_a_name(family: Family, basis: Basis, out: Path) -> None:
    name = "w" + "1" * 5000
    for model in ("a", "b"):
        change_tensors(family[model], **{name: torch.ones(3)})
    result = basis("merge", *models(family), "-o", out)
    assert result.exit_code == 0, result.stderr
    assert name in read_checkpoint(out)


def with_code(family: Family, tmp_path: Path) -> tuple[dict[str, bytes], Path]:
    """Give every model code of its own that leaves a mark when it runs."""
    mark = tmp_path / "it-ran"
    code = f"open({str(mark)!r}, 'w').close()\nclass Config: pass\nclass Model: pass\n"
    classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    for model in family.values():
        (model / "evil.py").write_text(code)
        change_json(model / "config.json", auto_map=classes, model_type="evil", architectures=["Model"])
    return {"evil.py": code.encode()}, mark


@both_methods
def test_code_of_a_repository_is_asked_about(family: Family, refuse: Refuse, tmp_path: Path, method: str) -> None:
    with_code(family, tmp_path)
    first = family["base" if method == "ortho" else "a"]
    cause, remedy = f"{first} asks for code from its repository", "--trust-remote-code"
    refuse(models(family, method), INPUT, cause, remedy, file=first / "config.json")


@both_methods
def test_trusted_code_is_copied_and_never_runs(
    family: Family, basis: Basis, tmp_path: Path, out: Path, method: str
) -> None:
    code, mark = with_code(family, tmp_path)
    before = snapshot(*family.values())
    result = basis("merge", *models(family, method), "--trust-remote-code", "-o", out)
    assert result.exit_code == 0, result.stderr
    assert not mark.exists()
    assert {file.name: file.read_bytes() for file in out.glob("*.py")} == code
    assert json.loads((out / "config.json").read_text())["auto_map"]["AutoConfig"] == "evil.Config"
    assert snapshot(*family.values()) == before


def test_code_that_no_config_asks_for_is_not_copied(family: Family, basis: Basis, out: Path) -> None:
    (family["a"] / "train.py").write_text("1 / 0")
    assert basis("merge", *models(family), "-o", out).exit_code == 0
    assert not list(out.glob("*.py"))


@pytest.mark.parametrize("path", ["..", ".", "../other", "/etc"])
def test_module_folders_outside_a_model_are_not_copied(family: Family, basis: Basis, tmp_path: Path, path: str) -> None:
    (family["a"] / "modules.json").write_text(json.dumps([{"path": path}, {"path": "1_Pooling"}]))
    (family["a"] / "1_Pooling").mkdir()
    (family["a"] / "1_Pooling" / "config.json").write_text("{}")
    (tmp_path / "secret.json").write_text("{}")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "secret.json").write_text("{}")
    out = tmp_path / "results" / "out"
    assert basis("merge", *models(family), "-o", out).exit_code == 0
    assert (out / "1_Pooling" / "config.json").is_file()
    assert not list((tmp_path / "results").rglob("secret.json"))
    assert [entry.name for entry in (tmp_path / "results").iterdir()] == ["out"]


# Other kinds of weights -----------------------------------------------------------------------------------------------


def test_a_folder_without_weights(family: Family, refuse: Refuse) -> None:
    weights_of(family["b"]).unlink()
    refuse(models(family), INPUT, "no weights here", file=family["b"])


def test_a_file_that_holds_no_weights(family: Family, refuse: Refuse) -> None:
    file = family["b"] / "tokenizer.json"
    refuse([family["a"], file, "-m", "linear"], INPUT, "not a .safetensors", file=file)


class Executes:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_pickle_that_would_run_code(family: Family, refuse: Refuse, tmp_path: Path, form: str) -> None:
    weights_of(family["b"]).unlink()
    file, mark = family["b"] / "pytorch_model.bin", tmp_path / "it-ran"
    content = {"w": torch.ones(2), "x": Executes(mark)}
    if form == "torch":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(Executes(mark)))
    refuse(models(family), INPUT, "without running code", "safetensors", file=file)
    assert not mark.exists()


@pytest.mark.parametrize(
    "content",
    [[torch.ones(2)], {"w": 1}, {"optimizer": {"w": {"m": torch.ones(2)}}}, torch.ones(2), {0: torch.ones(2)}],
    ids=["a list", "a number", "nested", "one tensor", "a number for a name"],
)
def test_a_pickle_that_is_no_table_of_tensors(family: Family, refuse: Refuse, content: object) -> None:
    weights_of(family["b"]).unlink()
    file = family["b"] / "pytorch_model.bin"
    torch.save(content, file)
    refuse(models(family), INPUT, "not a table of tensors", "safetensors", file=file)


def test_a_truncated_pickle(family: Family, refuse: Refuse) -> None:
    weights_of(family["b"]).unlink()
    file = family["b"] / "pytorch_model.bin"
    torch.save(make_tensors(1), file)
    file.write_bytes(file.read_bytes()[:-500])
    refuse(models(family), INPUT, "not a state dict", "safetensors", file=file)


@pytest.mark.parametrize("place", ["../x.bin", "gone.bin", "", 1, None, ["x.bin"], {}])
def test_a_pickle_index_that_points_elsewhere(family: Family, refuse: Refuse, tmp_path: Path, place: object) -> None:
    weights_of(family["b"]).unlink()
    for file in (tmp_path / "x.bin", family["b"] / "pytorch_model-1.bin"):
        torch.save(make_tensors(1), file)
    index = family["b"] / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {NORM: place, MATRIX: "pytorch_model-1.bin"}}))
    refuse(models(family), INPUT, "the index", file=index)


# Continuing -----------------------------------------------------------------------------------------------------------


def test_onto_a_folder_without_a_report(family: Family, refuse: Refuse) -> None:
    words = [family["a"], "-m", "ortho", "--base", family["base"], "--onto", family["b"]]
    cause, remedy = f"{family['b']} has no basis_report.json", "output folder of an earlier"
    refuse(words, INPUT, cause, remedy, file=family["b"])


def onto(family: Family, basis: Basis, earlier: Path) -> list[str | Path]:
    """Make a merge by `linear` and return the words that continue it."""
    assert basis("merge", *models(family), "-o", earlier).exit_code == 0
    return [family["c"], "-m", "linear", "--onto", earlier]


def test_onto_a_merge_by_another_method(family: Family, refuse: Refuse, basis: Basis, tmp_path: Path) -> None:
    earlier = tmp_path / "earlier"
    words = [*onto(family, basis, earlier), "-m", "ortho", "--base", family["base"]]
    cause, report = "was merged by linear, not by ortho", earlier / "basis_report.json"
    refuse(words, INPUT, cause, "--method linear", file=report)


@pytest.mark.parametrize(
    ("fields", "cause"),
    [({"schema_version": 99}, "schema version 99"), ({"tensors": 1}, "the report is damaged: tensors")],
)
def test_onto_a_report_that_cannot_be_read(
    family: Family, refuse: Refuse, basis: Basis, tmp_path: Path, fields: dict[str, Any], cause: str
) -> None:
    earlier = tmp_path / "earlier"
    words = onto(family, basis, earlier)
    change_json(earlier / "basis_report.json", **fields)
    refuse(words, INPUT, cause, file=earlier / "basis_report.json")


# Disk and other processes ---------------------------------------------------------------------------------------------


def test_not_enough_disk_space(family: Family, refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    remedy = "free some space"
    refuse(models(family), RESOURCE, "not enough disk space", remedy, file=tmp_path)


def shards_of(model: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in model.glob("*.safetensors")}


@both_methods
@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "write", "fsync"])
def test_a_disk_that_fills_up_at_any_moment(
    family: Family, refuse: Refuse, basis: Basis, tmp_path: Path, method: str, call: str
) -> None:
    for model in family.values():
        change_json(model / "config.json", architectures=[])  # names settle all kinds: no model is built to ask
    words = [*models(family, method), "--workers", "1", "--shard-size", "5kB"]
    with full_disk(call, 10**9) as seen:
        assert basis("merge", *words, "-o", tmp_path / "whole").exit_code == 0
    moments = len(seen) - (1 if call == "fsync" else 0)  # the last fsync follows the renaming
    assert moments > 3
    for after in range(0, moments, 1 if method == "linear" else 3):
        out = tmp_path / f"out{after}"
        with full_disk(call, after):
            refuse([*words, "-o", out], RESOURCE, "No space left on device", "the same command goes on")
        result = basis("merge", *words, "-o", out)
        assert result.exit_code == 0, result.stderr
        assert shards_of(out) == shards_of(tmp_path / "whole")
        assert not out.with_name(f"{out.name}.partial").exists()


def test_a_folder_that_has_its_name_is_finished(family: Family, basis: Basis, tmp_path: Path, out: Path) -> None:
    with full_disk("fsync", 10**9) as seen:
        assert basis("merge", *models(family), "-o", tmp_path / "whole").exit_code == 0
    with full_disk("fsync", len(seen) - 1):
        result = basis("merge", *models(family), "-o", out)
    assert result.exit_code == (0 if out.exists() else RESOURCE)
    assert not (out / "journal.jsonl").exists()


def test_the_file_that_found_no_room_is_named(family: Family, refuse: Refuse, out: Path) -> None:
    with full_disk("pwrite", 4):
        file = out.with_name("out.partial") / "model.safetensors"
        refuse(models(family), RESOURCE, "No space left on device", "free some space", file=file)


def test_another_process_that_writes_the_same_output(family: Family, refuse: Refuse, basis: Basis, out: Path) -> None:
    partial = out.with_name("out.partial")
    partial.mkdir()
    with (partial / "journal.jsonl").open("w") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        cause, remedy = "another basis process is writing", "wait for it"
        refuse(models(family), USAGE, cause, remedy, file=partial)
        assert [entry.name for entry in partial.iterdir()] == ["journal.jsonl"]
    assert basis("merge", *models(family), "-o", out).exit_code == 0


def test_a_place_where_no_folder_can_be_made(family: Family, refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    words = [*models(family), "-o", tmp_path / "file" / "out"]
    refuse(words, RESOURCE, "cannot write", "choose another -o", file=tmp_path / "file" / "out.partial")
