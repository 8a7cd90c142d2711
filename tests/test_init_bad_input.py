"""Every bad input of `init` and `extract`: what it says, how it exits, and that it touches nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import Result

from tests import kv_models
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
    assert "takes weight, rank, svd, inputs, random, not 'base'" in refused.stderr


# Shares of the energy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("energy", ["0", "-0.5", "1.01", "nan", "inf"])
def test_a_share_that_is_none(home: Path, refuse: Refuse, energy: str) -> None:
    refuse([*words(home, "extract"), "--energy", energy], USAGE, f"energy {energy}", "more than 0, at most 1")


def test_a_fine_tune_that_is_its_base(home: Path, refuse: Refuse) -> None:
    given = ["extract", home / "base", "--base", home / "base", "--energy", "0.9"]
    refuse(given, INPUT, "the model does not differ from its base", "the two models", file=home / "base")


@pytest.mark.parametrize("place", ["base", "tuned"])
def test_a_difference_that_is_no_number(home: Path, refuse: Refuse, place: str) -> None:
    file = spoil(home / place, UP, float("nan"))
    given = [*words(home, "extract"), "--energy", "0.9"]
    refuse(given, INPUT, "holds NaN or Inf", "sound checkpoint", file=file, tensor=UP)


def test_a_dtype_that_cannot_hold_a_difference(home: Path, refuse: Refuse) -> None:
    change_tensors(home / "tuned", **{UP: read_checkpoint(home / "tuned")[UP] * 1e12})
    given = [*words(home, "extract"), "--energy", "0.9", "--dtype", "f16"]
    refuse(given, INPUT, "do not fit F16", "a wider --dtype")


# Calibration ----------------------------------------------------------------------------------------------------------

both_data = pytest.mark.parametrize("method", ["eva", "corda"])


@pytest.fixture
def speaking(home: Path) -> Path:
    """Return the folder with a model that runs, too, a tokenizer in it, and a text."""
    kv_models.save_model(home / "model", kv_models.make_model())
    (home / "text.txt").write_text(kv_models.make_text(2000))
    return home


def data(home: Path, *more: str | Path, method: str = "eva", text: str = "text.txt", rank: int = 4) -> list[str | Path]:
    """Return the words of a run from data that works."""
    text_of: list[str | Path] = ["--calibration", home / text, "--length", "32", "--tokens", "960"]
    return ["init", home / "model", "-m", method, "-r", str(rank), *text_of, *more]


def save_tokens(home: Path, **tensors: Tensor) -> Path:
    save_file(tensors, home / "tokens.safetensors")
    return home / "tokens.safetensors"


@both_data
def test_what_works_from_data_without_a_fault(speaking: Path, basis: Basis, method: str) -> None:
    before = snapshot(speaking)
    result = basis(*data(speaking, method=method), "-o", speaking / "out")
    assert result.exit_code == 0, result.stderr
    after = snapshot(speaking)
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("option", [["--calibration", "text.txt"], ["--tokens", "512"], ["--length", "64"]], ids=str)
@pytest.mark.parametrize("method", ["pissa", "milora", "olora"])
def test_methods_of_weights_want_no_text(home: Path, refuse: Refuse, method: str, option: list[str]) -> None:
    given = [*words(home), "-m", method, *option]
    refuse(given, USAGE, f"{method} looks at the weights alone", "leave out --calibration and --tokens")


@pytest.mark.parametrize(
    ("option", "name"), [(["--rho", "2"], "rho"), (["--whiten"], "whiten"), (["--no-center"], "center")], ids=str
)
@pytest.mark.parametrize("method", ["pissa", "corda"])
def test_options_of_eva_with_another_method(
    speaking: Path, refuse: Refuse, method: str, option: list[str], name: str
) -> None:
    given = data(speaking, *option, method=method) if method == "corda" else [*words(speaking), *option]
    known = "known: damping, mode" if method == "corda" else "none is known"
    refuse(given, USAGE, f"{method} has no parameter '{name}'", known)


@pytest.mark.parametrize(
    ("method", "more", "cause", "remedy"),
    [
        ("eva", ["-p", "rhoo=2"], "eva has no parameter 'rhoo'", "did you mean 'rho'?"),
        ("eva", ["-p", "centre=false"], "eva has no parameter 'centre'", "did you mean 'center'?"),
        ("eva", ["--rho", "0.5"], "parameter rho=0.5 of eva", "methods show eva"),
        ("eva", ["--rho", "nan"], "parameter rho=nan of eva", "methods show eva"),
        ("eva", ["--rho", "1e9"], "parameter rho=1000000000.0 of eva", "methods show eva"),
        ("eva", ["-p", "whiten=perhaps"], "parameter whiten='perhaps' of eva", "methods show eva"),
        ("corda", ["-p", "dampng=1"], "corda has no parameter 'dampng'", "did you mean 'damping'?"),
        ("corda", ["-p", "damping=0"], "parameter damping=0 of corda", "methods show corda"),
        ("corda", ["-p", "damping=2"], "parameter damping=2 of corda", "methods show corda"),
        ("corda", ["-p", "mode=ipm"], "parameter mode='ipm' of corda", "methods show corda"),
        ("eva", ["--tokens", "31"], "31 tokens in windows of 32", "one window at least"),
        ("eva", ["--tokens", "-5"], "-5 tokens in windows of 32", "one window at least"),
        ("eva", ["--tokens", "0"], "0 tokens in windows of 32", "one window at least"),
        ("eva", ["--length", "0"], "960 tokens in windows of 0", "one window at least"),
        ("eva", ["--length", "-1"], "960 tokens in windows of -1", "one window at least"),
        ("eva", ["-r", "33"], "rank 33 is larger than the matrix", "--rank 32 at most"),
        ("corda", ["-r", "33"], "rank 33 is larger than the matrix", "--rank 32 at most"),
        ("eva", ["--target-modules", "q_prj"], "no linear layer is called 'q_prj'", "did you mean 'q_proj'?"),
        ("corda", ["--target-modules", r".*layers\.9\..*"], "matches no linear layer", "names out of down_proj"),
        ("eva", ["--alpha", "0"], "alpha 0", "a positive number"),
    ],
)
def test_options_that_mean_nothing(
    speaking: Path, refuse: Refuse, method: str, more: list[str], cause: str, remedy: str
) -> None:
    refuse(data(speaking, *more, method=method), USAGE, cause, remedy)


def test_extract_wants_no_text(home: Path, basis: Basis) -> None:
    result = basis(*words(home, "extract"), "--calibration", home / "text.txt", "-o", home / "out")
    assert result.exit_code == USAGE
    assert "No such option" in result.stderr


@both_data
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_text_that_is_not_there(speaking: Path, refuse: Refuse, method: str, dry: list[str]) -> None:
    for name in ("gone.txt", "gone.safetensors"):
        given = data(speaking, *dry, method=method, text=name)
        refuse(given, INPUT, "no such calibration file", "check the path", file=speaking / name)


@both_data
@pytest.mark.parametrize("content", ["", " \n\n\t"])
def test_a_text_of_nothing(speaking: Path, refuse: Refuse, method: str, content: str) -> None:
    (speaking / "text.txt").write_text(content)
    given = data(speaking, method=method)
    refuse(given, INPUT, "no text in the calibration data", "give more text", file=speaking / "text.txt")
    (speaking / "text").mkdir()
    refuse(data(speaking, text="text"), INPUT, "no text in the calibration data", file=speaking / "text")


def test_a_text_that_is_no_text(speaking: Path, refuse: Refuse) -> None:
    (speaking / "text.txt").write_bytes(b"\xff\xfe\x00\xd8" * 99)
    refuse(data(speaking), INPUT, "not readable as UTF-8 text", file=speaking / "text.txt")
    (speaking / "text.jsonl").write_text('{"text": "one"}\n{"txt": "two"}\n')
    refuse(data(speaking, text="text.jsonl"), INPUT, "line 2", '{"text": "…"}', file=speaking / "text.jsonl")


@both_data
def test_less_text_than_a_window(speaking: Path, refuse: Refuse, method: str) -> None:
    (speaking / "text.txt").write_text("thirty letters and the end....")
    cause = "the calibration text has 31 tokens, fewer than one window of 32"
    refuse(data(speaking, method=method), INPUT, cause, "give more text", file=speaking / "text.txt")


def test_fewer_tokens_than_directions(speaking: Path, refuse: Refuse) -> None:
    """32 tokens have 31 directions at most, once their mean is out."""
    given = data(speaking, "--tokens", "32", "--rho", "4", rank=8)
    cause = "32 calibration tokens reach this layer, too few for 32 directions"
    tensor = "model.layers.0.self_attn.k_proj.weight"
    refuse(given, INPUT, cause, "a smaller --rank", file=speaking / "text.txt", tensor=tensor)


def test_fewer_windows_than_directions_of_a_pooler(speaking: Path, refuse: Refuse) -> None:
    """It reads one token a window."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    kv_models.save_model(speaking / "model", transformers.BertModel(config))
    cause = "8 calibration tokens reach this layer, too few for 8 directions"
    given = data(speaking, "--tokens", "256")
    refuse(given, INPUT, cause, "more --tokens", file=speaking / "text.txt", tensor="pooler.dense.weight")


@both_data
def test_a_model_without_a_tokenizer(speaking: Path, refuse: Refuse, method: str, basis: Basis) -> None:
    for file in speaking.glob("model/tokenizer*"):
        file.unlink()
    given = data(speaking, method=method)
    refuse(given, INPUT, "no tokenizer that loads", "--calibration tokens.safetensors", file=speaking / "model")
    save_tokens(speaking, input_ids=kv_models.some_ids(30))
    result = basis(*data(speaking, method=method, text="tokens.safetensors"), "-o", speaking / "out")
    assert result.exit_code == 0, result.stderr


IDS = kv_models.some_ids(30)
ONES = torch.ones_like(IDS)


@pytest.mark.parametrize(
    ("tensors", "cause", "tensor"),
    [
        ({"input_ids": IDS + 200}, "is outside the model's vocabulary of 260", None),
        ({"input_ids": IDS - 99}, "is outside the model's vocabulary of 260", None),
        ({"tokens": IDS}, "no `input_ids` of shape [windows, tokens]", None),
        ({"input_ids": IDS.float()}, "no `input_ids` of shape [windows, tokens]", None),
        ({"input_ids": IDS[0].contiguous()}, "no `input_ids` of shape [windows, tokens]", None),
        ({"input_ids": IDS[:0]}, "no `input_ids` of shape [windows, tokens]", None),
        ({"input_ids": IDS, "attention_mask": ONES[:, :9].contiguous()}, "[30, 9] is not the shape", "attention_mask"),
        ({"input_ids": IDS, "labels": ONES[:9].contiguous()}, "[9, 32] is not the shape", "labels"),
        ({"input_ids": IDS, "attention_mask": 0 * ONES}, "no token of the calibration file counts", None),
        ({"input_ids": IDS, "labels": -100 * ONES}, "no token of the calibration file counts", None),
    ],
)
@both_data
def test_tokens_that_cannot_be_read(
    speaking: Path, refuse: Refuse, method: str, tensors: dict[str, Tensor], cause: str, tensor: str | None
) -> None:
    file = save_tokens(speaking, **tensors)
    refuse(data(speaking, method=method, text=file.name), INPUT, cause, file=file, tensor=tensor)


def test_a_file_of_tokens_that_is_cut_off(speaking: Path, refuse: Refuse) -> None:
    file = save_tokens(speaking, input_ids=IDS)
    file.write_bytes(file.read_bytes()[:-100])
    refuse(data(speaking, text=file.name), INPUT, "", file=file)


# Models that do not run -----------------------------------------------------------------------------------------------


@both_data
def test_a_model_that_asks_for_more_than_weights(speaking: Path, refuse: Refuse, method: str) -> None:
    config = speaking / "model" / "config.json"
    before = config.read_text()
    for fields, cause in (
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "brings its own code, which is not run"),
        ({"quantization_config": {"quant_method": "gptq"}}, "packed by gptq"),
    ):
        config.write_text(before)
        change_json(config, **fields)
        refuse(data(speaking, method=method), INPUT, cause, "give ", file=config)


@both_data
@pytest.mark.parametrize(
    "fields",
    [
        {"architectures": ["NeverHeardOfForCausalLM"], "model_type": "never_heard_of"},
        {"architectures": ["NeverHeardOfForCausalLM"]},
        {"architectures": ["AutoTokenizer"]},
        {"architectures": []},
        {"architectures": None},
    ],
    ids=str,
)
def test_an_architecture_that_transformers_does_not_know(
    speaking: Path, refuse: Refuse, method: str, fields: dict[str, object]
) -> None:
    config = speaking / "model" / "config.json"
    change_json(config, **fields)
    refuse(data(speaking, method=method), INPUT, "transformers does not build the model", file=config)


@both_data
@pytest.mark.parametrize("targets", ["all-linear", r"encoder\..*", r"decoder\..*"])
def test_an_encoder_and_a_decoder(speaking: Path, refuse: Refuse, method: str, targets: str) -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=260, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    kv_models.save_model(speaking / "model", transformers.T5ForConditionalGeneration(config))
    given = data(speaking, "--target-modules", targets, method=method)
    if targets != "all-linear":
        refuse(given, INPUT, "")
        return
    cause = "the targets are in encoder.block and decoder.block: calibration runs one stack of layers"
    refuse(given, INPUT, cause, "--target-modules", file=speaking / "model" / "config.json")


@both_data
@pytest.mark.parametrize("targets", ["all-linear", "q_proj,v_proj"])
def test_experts(speaking: Path, refuse: Refuse, method: str, targets: str) -> None:
    """transformers fuses them: what is stored is no parameter of the model."""
    torch.manual_seed(0)
    sizes = {"num_local_experts": 4, "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48}
    config = transformers.MixtralConfig(
        **sizes, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False
    )
    kv_models.save_model(speaking / "model", transformers.MixtralForCausalLM(config))
    result = refuse(data(speaking, "--target-modules", targets, method=method), INPUT, "", file=speaking / "model")
    assert re.search(r"tensor: model\.layers\.0\.(block_sparse_moe|mlp)\.", result.stderr)


@both_data
def test_a_layer_that_runs_more_than_once(speaking: Path, refuse: Refuse, method: str) -> None:
    """ALBERT's only layer is called three times, with other inputs each time."""
    torch.manual_seed(0)
    config = transformers.AlbertConfig(
        vocab_size=260, embedding_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4,
    )  # fmt: skip
    kv_models.save_model(speaking / "model", transformers.AlbertModel(config))
    refuse(data(speaking, method=method), INPUT, "", file=speaking / "model" / "config.json")


@both_data
def test_images_are_no_tokens(speaking: Path, refuse: Refuse, method: str) -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    kv_models.save_model(speaking / "model", transformers.ViTModel(config), tokenizer=False)
    file = save_tokens(speaking, input_ids=IDS)
    refuse(data(speaking, method=method, text=file.name), INPUT, "")


@both_data
def test_windows_longer_than_the_model_can_read(speaking: Path, refuse: Refuse, method: str) -> None:
    """GPT-2 has an embedding for each position, and no more of them than these."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 260, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24}
    kv_models.save_model(speaking / "model", transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)))
    refuse(data(speaking, method=method), INPUT, "24", "--length")


@both_data
@pytest.mark.parametrize(
    "name",
    ["model.layers.1.mlp.down_proj.weight", "model.layers.2.input_layernorm.weight", "model.embed_tokens.weight"],
)
def test_a_checkpoint_that_lacks_a_tensor(speaking: Path, refuse: Refuse, method: str, name: str) -> None:
    change_tensors(speaking / "model", **{name: None})
    given = data(speaking, method=method)
    refuse(given, INPUT, "is not in the checkpoint", "", file=speaking / "model", tensor=name)


@both_data
@pytest.mark.parametrize(
    "fields",
    [{"hidden_size": 64}, {"intermediate_size": 40}, {"num_hidden_layers": 4}, {"num_key_value_heads": 4},
     {"vocab_size": 300}],
    ids=str,
)  # fmt: skip
def test_a_config_of_another_model(speaking: Path, refuse: Refuse, method: str, fields: dict[str, int]) -> None:
    change_json(speaking / "model" / "config.json", **fields)
    refuse(data(speaking, method=method), INPUT, "is not in the checkpoint as it is", file=speaking / "model")


@both_data
def test_a_config_of_fewer_layers(speaking: Path, refuse: Refuse, method: str) -> None:
    """The other layers are there, and the model that the config makes has no place for them."""
    change_json(speaking / "model" / "config.json", num_hidden_layers=2)
    result = refuse(
        data(speaking, method=method),
        INPUT,
        "",
        file=speaking / "model" / "config.json",
        tensor="model.layers.2.mlp.down_proj.weight",
    )
    assert "one module of several weights" not in result.stderr


@both_data
@pytest.mark.parametrize("text", ["text.txt", "tokens.safetensors"])
@pytest.mark.parametrize("fields", [{"num_attention_heads": "four"}, {"hidden_size": 33}], ids=str)
def test_a_config_that_contradicts_itself(
    speaking: Path, refuse: Refuse, method: str, fields: dict[str, object], text: str
) -> None:
    save_tokens(speaking, input_ids=IDS)
    change_json(speaking / "model" / "config.json", **fields)
    refuse(data(speaking, method=method, text=text), INPUT, "")


@both_data
@pytest.mark.parametrize(
    "name",
    ["model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight",
     "model.layers.2.input_layernorm.weight", "model.embed_tokens.weight"],
)  # fmt: skip
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_no_numbers(speaking: Path, refuse: Refuse, method: str, name: str, value: float) -> None:
    file = change_tensors(
        speaking / "model", **{name: torch.full_like(read_checkpoint(speaking / "model")[name], value)}
    )
    result = refuse(data(speaking, method=method), INPUT, "NaN or Inf")
    assert f"file: {file}" in result.stderr or f"file: {speaking / 'model'}\n" in result.stderr


@both_data
def test_a_head_that_gets_no_numbers(speaking: Path, refuse: Refuse, method: str) -> None:
    spoil(speaking / "model", NORM, float("nan"))
    given = data(speaking, "--target-modules", "lm_head,q_proj", method=method)
    refuse(given, INPUT, "NaN or Inf", file=speaking / "model")


def test_whitening_that_no_float16_holds(speaking: Path, refuse: Refuse) -> None:
    """Directions in which the inputs hardly vary become very long rows."""
    name = "model.layers.0.input_layernorm.weight"
    change_tensors(speaking / "model", **{name: torch.full((32,), 1e-9)})
    given = data(speaking, "--whiten", "--dtype", "f16", "--rho", "1", "--target-modules", r".*0\.self_attn\.q_proj")
    refuse(given, INPUT, "do not fit F16", "a wider --dtype")


@both_data
def test_a_head_alone_is_in_no_stack_of_layers(speaking: Path, refuse: Refuse, method: str) -> None:
    given = data(speaking, "--target-modules", "lm_head", method=method)
    config = speaking / "model" / "config.json"
    refuse(given, INPUT, "in no list of layers", "--target-modules", file=config)


# Plugins of data ------------------------------------------------------------------------------------------------------

ODD_DIRECTIONS = """
import torch
from basiscli import DataInit, transform

@transform("init")
class Odd(DataInit):
    "Something else."
    def offered(self, rank):
        return 2 * rank
    def directions(self, inputs, count, svd):
        rows, scores = svd.axes(inputs.centred, count)
        return {result}
"""
ODD_FACTORS = """
from basiscli import transform

@transform("init")
def odd(weight, rank, inputs):
    "Something else."
    return {result}
"""


@pytest.mark.parametrize(
    ("source", "result", "cause"),
    [
        (ODD_DIRECTIONS, "rows[1:], scores", "made directions of [7, 32] with 8 scores"),
        (ODD_DIRECTIONS, "rows, scores[1:]", "made directions of [8, 32] with 7 scores"),
        (ODD_DIRECTIONS, "rows.mT, scores", "made directions of [32, 8] with 8 scores"),
        (ODD_DIRECTIONS, "rows * float('nan'), scores", "or NaN"),
        (ODD_DIRECTIONS, "rows, scores * float('nan')", "or NaN"),
        (ODD_FACTORS, "weight, inputs.raw", "made factors of [64, 32] and [32, 32]"),
        (ODD_FACTORS, "weight[:, :rank] / 0, weight[:rank]", "made factors with NaN or Inf"),
    ],
)
def test_a_plugin_of_data_that_makes_something_else(
    speaking: Path, basis: Basis, source: str, result: str, cause: str
) -> None:
    file = speaking / "odd.py"
    file.write_text(source.format(result=result))
    given = data(speaking, "--plugin", file, "--target-modules", "q_proj", method="odd")
    refused = basis(*given, "-o", speaking / "out")
    assert refused.exit_code == FAULT, refused.stderr
    assert cause in refused.stderr
    assert "tensor: model.layers.0.self_attn.q_proj.weight" in refused.stderr
    assert not (speaking / "out").exists()
