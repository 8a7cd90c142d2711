"""Every bad input of `init` and `extract`: what it says, how it exits, and that it touches nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import Result

from tests.conftest import add, make_tensors, read_checkpoint, snapshot, write_checkpoint

FAULT, USAGE, INPUT, RESOURCE = 1, 2, 3, 6
UP = "model.layers.0.mlp.up_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"

Basis = Callable[..., Result]
Refuse = Callable[..., Result]
both_commands = pytest.mark.parametrize("command", ["init", "extract"])


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return a folder with `base` and its fine-tune `tuned`."""
    base = {name: tensor for name, tensor in make_tensors(0).items() if "empty" not in name}
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "tuned", add(base, make_tensors(1)))
    return tmp_path


@pytest.fixture
def refuse(basis: Basis, home: Path) -> Refuse:
    """Return a function that runs a command and checks that it is refused as it should be, and changes nothing."""

    def check(
        words: Sequence[str | Path],
        code: int,
        cause: str,
        remedy: str = "",
        *,
        file: Path | None = None,
        tensor: str | None = None,
    ) -> Result:
        out = Path(words[words.index("-o") + 1]) if "-o" in words else home / "out"
        before = snapshot(home)
        result = basis(*words, "-o", out)
        message = result.stderr
        assert result.exit_code == code, message
        assert re.match(r"(note: .*\n)?error: ", message)
        assert cause in message
        assert file is None or f"\n  file: {file}\n" in message
        assert tensor is None or f"\n  tensor: {tensor}\n" in message
        assert re.search(f"^  to do: .*{re.escape(remedy)}", message, re.MULTILINE), message
        assert snapshot(home) == before
        assert not list(home.glob("*.partial"))
        return result

    return check


def words(home: Path, command: str = "init") -> list[str | Path]:
    """Return the words of a run that works."""
    return [command, home / "tuned", "-r", "4", *(["--base", home / "base"] if command == "extract" else [])]


def change_json(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def change_tensors(model: Path, **changes: Tensor | None) -> Path:
    """Replace tensors of a checkpoint; None removes one. Return the file."""
    table = {name: tensor for name, tensor in (read_checkpoint(model) | changes).items() if tensor is not None}
    save_file(table, model / "model.safetensors", {"format": "pt"})
    return model / "model.safetensors"


def spoil(model: Path, name: str, value: float) -> Path:
    """Put one number into the middle of a tensor. Return the file."""
    tensor = read_checkpoint(model)[name].clone()
    tensor.view(-1)[tensor.numel() // 2] = value
    return change_tensors(model, **{name: tensor})


@both_commands
def test_what_works_without_a_fault(home: Path, basis: Basis, command: str) -> None:
    before = snapshot(home)
    result = basis(*words(home, command), "-o", home / "out")
    assert result.exit_code == 0, result.stderr
    after = snapshot(home)
    assert {name: after[name] for name in before} == before


# Rank, alpha, method --------------------------------------------------------------------------------------------------


@both_commands
@pytest.mark.parametrize("rank", ["0", "-3"])
def test_a_rank_below_one(home: Path, refuse: Refuse, command: str, rank: str) -> None:
    refuse([*words(home, command), "-r", rank], USAGE, f"rank {rank}", "at least 1")


@both_commands
def test_a_rank_that_a_matrix_does_not_have(home: Path, refuse: Refuse, command: str) -> None:
    cause = "rank 25 is larger than the matrix (40 × 24)"
    given = [*words(home, command), "-r", "25", "--target-modules", "up_proj"]
    refuse(given, USAGE, cause, "--rank 24 at most", tensor=UP)


def test_the_largest_rank_is_that_of_the_smallest_target(home: Path, refuse: Refuse) -> None:
    change_tensors(home / "tuned", **{"model.layers.1.mlp.up_proj.weight": torch.ones(40, 6)})
    refuse([*words(home), "-r", "30"], USAGE, "rank 30 is larger", "--rank 6 at most")
    refuse([*words(home), "-r", "7"], USAGE, "(40 × 6)", "--rank 6", tensor="model.layers.1.mlp.up_proj.weight")


@both_commands
@pytest.mark.parametrize("alpha", ["0", "-1", "nan", "inf"])
def test_an_alpha_that_scales_nothing(home: Path, refuse: Refuse, command: str, alpha: str) -> None:
    refuse([*words(home, command), "--alpha", alpha], USAGE, f"alpha {alpha}", "a positive number")


def test_an_unknown_method(home: Path, refuse: Refuse) -> None:
    refuse([*words(home), "-m", "pisa"], USAGE, "pisa", "did you mean 'pissa'?")
    refuse([*words(home), "-m", "ortho"], USAGE, "ortho")  # it is one of another command


def test_an_unknown_parameter(home: Path, refuse: Refuse) -> None:
    refuse([*words(home), "-p", "niter=4"], USAGE, "pissa has no parameter 'niter'")


@both_commands
def test_a_number_of_workers_that_does_nothing(home: Path, refuse: Refuse, command: str) -> None:
    refuse([*words(home, command), "--workers", "0"], USAGE, "0 workers", "at least one")


@both_commands
def test_a_dtype_that_cannot_hold_the_values(home: Path, refuse: Refuse, command: str) -> None:
    for name in (UP, QUERY, "model.layers.0.mlp.down_proj.weight"):
        change_tensors(home / "tuned", **{name: read_checkpoint(home / "tuned")[name] * 1e12})
    refuse([*words(home, command), "--dtype", "f16"], INPUT, "do not fit F16", "a wider --dtype")


def test_a_dtype_that_cannot_hold_what_is_copied(home: Path, refuse: Refuse) -> None:
    file = change_tensors(home / "tuned", **{NORM: torch.full((24,), 1e6)})
    given = [*words(home), "--dtype", "f16"]
    refuse(given, INPUT, "the values do not fit F16", "a wider --dtype", file=file, tensor=NORM)


# Targets --------------------------------------------------------------------------------------------------------------


@both_commands
@pytest.mark.parametrize("pattern", [r".*\.layers\.9\..*", "q_proj|v_proj", "(q_proj, up_proj)"])
def test_targets_that_match_nothing(home: Path, refuse: Refuse, command: str, pattern: str) -> None:
    given = [*words(home, command), "--target-modules", pattern]
    refuse(
        given, USAGE, f"--target-modules {pattern} matches no linear layer", "names out of down_proj, q_proj, up_proj"
    )


@both_commands
def test_targets_that_are_no_regular_expression(home: Path, refuse: Refuse, command: str) -> None:
    given = [*words(home, command), "--target-modules", r".*(q_proj"]
    cause = "--target-modules '.*(q_proj' is no regular expression"
    refuse(given, USAGE, cause, "up_proj")


@both_commands
@pytest.mark.parametrize("names", ["q_prj", "up_proj,q_prj", "up_proj,j.q_prj"])
def test_a_name_that_no_layer_has(home: Path, refuse: Refuse, command: str, names: str) -> None:
    given = [*words(home, command), "--target-modules", names]
    refuse(given, USAGE, f"no linear layer is called '{names.rpartition(',')[2]}'", "did you mean 'q_proj'?")


@pytest.mark.parametrize("name", ["norm", "embed_tokens", "conv"])
def test_layers_that_are_not_linear_are_no_targets(home: Path, refuse: Refuse, name: str) -> None:
    given = [*words(home), "--target-modules", name]
    refuse(given, USAGE, f"no linear layer is called '{name}'", "known: down_proj, q_proj, up_proj")


@both_commands
def test_a_checkpoint_of_no_linear_layers(home: Path, refuse: Refuse, command: str) -> None:
    for model in ("base", "tuned"):
        tensors = {name: tensor for name, tensor in read_checkpoint(home / model).items() if "proj" not in name}
        save_file(tensors, home / model / "model.safetensors")
    refuse(words(home, command), INPUT, "holds no linear layer", "a whole model", file=home / "tuned")


@both_commands
def test_an_empty_checkpoint(home: Path, refuse: Refuse, command: str) -> None:
    save_file({}, home / "tuned" / "model.safetensors")
    refuse(words(home, command), INPUT, "holds no linear layer", "a whole model", file=home / "tuned")


# Models ---------------------------------------------------------------------------------------------------------------


@both_commands
def test_a_folder_without_weights(home: Path, refuse: Refuse, command: str) -> None:
    (home / "tuned" / "model.safetensors").unlink()
    refuse(words(home, command), INPUT, "no weights here", file=home / "tuned")


@both_commands
def test_a_model_that_is_not_there(home: Path, refuse: Refuse, command: str) -> None:
    given = words(home, command)
    refuse([command, home / "gone", *given[2:]], INPUT, f"no such model: {home / 'gone'}", "a folder")


@pytest.mark.parametrize("place", ["model", "base"])
def test_an_adapter_for_a_model(home: Path, refuse: Refuse, place: str) -> None:
    adapter = home / ("tuned" if place == "model" else "base")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    refuse(words(home, "extract"), INPUT, "this is an adapter", "give its base", file=adapter)
    if place == "model":
        refuse(words(home), INPUT, "this is an adapter", "give its base", file=adapter)


@pytest.mark.parametrize("which", ["base", "tuned"])
@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "packed by bitsandbytes"),
        ({"quantization_config": {"bits": 4}}, "packed by a quantiser"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "brings its own code"),
    ],
    ids=str,
)
def test_a_config_that_asks_for_more_than_weights(
    home: Path, refuse: Refuse, which: str, fields: dict[str, object], cause: str
) -> None:
    config = home / which / "config.json"
    change_json(config, **fields)
    refuse(words(home, "extract"), INPUT, cause, "give ", file=config)
    if which == "tuned":
        refuse(words(home), INPUT, cause, "give ", file=config)


@pytest.mark.parametrize("which", ["base", "tuned"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn], ids=str)
def test_packed_weights_that_no_config_tells_of(home: Path, refuse: Refuse, which: str, dtype: torch.dtype) -> None:
    file = change_tensors(home / which, **{UP: torch.ones(40, 24).to(dtype)})
    refuse(words(home, "extract"), INPUT, "weights are not decomposed", "unquantised", file=file, tensor=UP)
    if which == "tuned":
        refuse(words(home), INPUT, "weights are not decomposed", "unquantised", file=file, tensor=UP)


def test_a_base_of_another_shape(home: Path, refuse: Refuse) -> None:
    change_tensors(home / "base", **{UP: torch.ones(48, 24)})
    cause = f"the base ({home / 'base'}) has [48, 24], not [40, 24]"
    refuse(words(home, "extract"), INPUT, cause, "--base", file=home / "base", tensor=UP)


def test_a_base_that_lacks_a_tensor(home: Path, refuse: Refuse) -> None:
    change_tensors(home / "base", **{UP: None})
    cause = f"the base ({home / 'base'}) lacks it"
    refuse(words(home, "extract"), INPUT, cause, "--base", file=home / "base", tensor=UP)


def test_extract_needs_a_base(home: Path, basis: Basis) -> None:
    result = basis("extract", home / "tuned", "-o", home / "out")
    assert result.exit_code == USAGE
    assert "--base" in result.stderr


# Values ---------------------------------------------------------------------------------------------------------------


@both_commands
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [[], ["--allow-nonfinite"], ["--exact", "--workers", "1"]], ids=str)
def test_a_weight_that_is_no_number(home: Path, refuse: Refuse, command: str, value: float, options: list[str]) -> None:
    """It has no singular values, and no option gives it some."""
    file = spoil(home / "tuned", UP, value)
    refuse([*words(home, command), *options], INPUT, "holds NaN or Inf", "sound checkpoint", file=file, tensor=UP)


def test_a_base_that_is_no_number(home: Path, refuse: Refuse) -> None:
    file = spoil(home / "base", QUERY, float("nan"))
    refuse(words(home, "extract"), INPUT, "holds NaN or Inf", "sound checkpoint", file=file, tensor=QUERY)


@pytest.mark.parametrize("name", [NORM, EMBEDDING])
def test_a_copied_tensor_that_is_no_number_can_be_accepted(home: Path, refuse: Refuse, basis: Basis, name: str) -> None:
    file = spoil(home / "tuned", name, float("nan"))
    refuse(words(home), INPUT, "holds NaN or Inf", "--allow-nonfinite", file=file, tensor=name)
    result = basis(*words(home), "--allow-nonfinite", "-o", home / "out")
    assert result.exit_code == 0, result.stderr
    copied = read_checkpoint(home / "out" / "residual")[name]
    assert torch.equal(copied.view(torch.int32), read_checkpoint(home / "tuned")[name].view(torch.int32))


# Places ---------------------------------------------------------------------------------------------------------------


@both_commands
def test_an_output_that_exists(home: Path, refuse: Refuse, basis: Basis, command: str) -> None:
    assert basis(*words(home, command), "-o", home / "out").exit_code == 0
    refuse(words(home, command), USAGE, "the output exists", "--overwrite", file=home / "out")
    (home / "out" / "basis_report.json").unlink()
    refuse([*words(home, command), "--overwrite"], USAGE, "not written by basis", file=home / "out")


@both_commands
@pytest.mark.parametrize("inside", ["tuned/out", "tuned", "."])
def test_an_output_among_the_inputs(home: Path, refuse: Refuse, command: str, inside: str) -> None:
    given = [*words(home, command), "-o", (home / inside).resolve()]
    refuse(given, USAGE, "the output would", "another -o", file=home / "tuned" if inside != "." else None)


def test_an_output_inside_the_base(home: Path, refuse: Refuse) -> None:
    given = [*words(home, "extract"), "-o", home / "base" / "out"]
    refuse(given, USAGE, "inside an input", "another -o", file=home / "base")


@both_commands
def test_a_device_that_is_not_there(home: Path, refuse: Refuse, command: str) -> None:
    refuse([*words(home, command), "--device", "cuda:99"], RESOURCE, "no device 'cuda:99'", "--device cpu")


# Plugins --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "cause"),
    [
        ("(weight, weight)", "made factors of [24, 24] and [24, 24]"),
        ("(weight[:, :rank - 1], weight[:rank - 1])", "made factors of [24, 3] and [3, 24]"),
        ("(weight[:rank], weight[:, :rank])", "made factors of [4, 24] and [24, 4]"),
        ("(weight[:, :rank] * float('nan'), weight[:rank])", "made factors with NaN or Inf"),
        ("(weight[:, :rank], weight[:rank] / 0)", "made factors with NaN or Inf"),
    ],
)
def test_a_plugin_that_makes_no_factors(home: Path, basis: Basis, result: str, cause: str) -> None:
    file = home / "odd.py"
    file.write_text(
        "from basiscli import transform\n"
        '@transform("init")\n'
        "def odd(weight, rank):\n"
        '    "Something else."\n'
        f"    return {result}\n"
    )
    given = [*words(home), "-m", "odd", "--plugin", file, "--target-modules", "q_proj", "-o", home / "out"]
    refused = basis(*given)
    assert refused.exit_code == FAULT
    assert f"odd {cause}" in refused.stderr
    assert f"tensor: {QUERY}" in refused.stderr
    assert "report this to its author" in refused.stderr
    assert not (home / "out").exists()


def test_a_plugin_that_asks_for_what_there_is_not(home: Path, basis: Basis) -> None:
    file = home / "odd.py"
    file.write_text('from basiscli import transform\n@transform("init")\ndef odd(weight, base):\n    "x."\n')
    refused = basis(*words(home), "-m", "odd", "--plugin", file, "-o", home / "out")
    assert refused.exit_code == USAGE
    assert "takes weight, rank, svd, not 'base'" in refused.stderr
