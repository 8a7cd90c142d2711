"""Every bad input of a compression: what it says, how it exits, and that it touches nothing."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import Result

import basiscli
from basiscli.commands.kv.run import KVRun
from basiscli.errors import UsageError
from tests.conftest import full_disk, read_checkpoint, snapshot, write_checkpoint
from tests.kv_models import llama, make_model, make_text, save_model

USAGE, INPUT, RESOURCE = 2, 3, 6
KEYS = "model.layers.1.self_attn.k_proj.weight"
MADE = ("model.safetensors", "kv_projection.safetensors", "kv_projection.json")

Basis = Callable[..., Result]
Refuse = Callable[..., Result]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def m(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(make_text(1500))
    return save_model(tmp_path / "m", make_model())


def words(model: Path | str, *more: str | Path, ratio: str = "0.5", text: Path | None = None) -> list[str | Path]:
    """Return the words of a compression that works."""
    text = Path(model).parent / "text.txt" if text is None else text
    quick: list[str | Path] = ["--train-steps", "2", "--length", "32", "--search", "uniform", "--calibration", text]
    return [model, "--kv-ratio", ratio, *quick, *more]


@pytest.fixture
def refuse(basis: Basis, tmp_path: Path, out: Path) -> Refuse:
    """Return a function that runs a compression and checks that it is refused as it should be, and changes nothing."""

    def check(
        command: Sequence[str | Path],
        code: int,
        cause: str,
        remedy: str = "",
        *,
        file: Path | None = None,
        tensor: str | None = None,
    ) -> Result:
        place = Path(command[command.index("-o") + 1]) if "-o" in command else out
        unfinished = place.with_name(f"{place.name}.partial")
        existed, before = os.path.lexists(place), files_of(tmp_path, unfinished)
        result = basis("compress", *command, *([] if "-o" in command else ["-o", place]))
        message = result.stderr[result.stderr.find("error: ") :]  # notes come first
        assert result.exit_code == code, result.stderr
        assert message.startswith("error: ")
        assert cause in message
        assert file is None or f"\n  file: {file}\n" in message, message
        assert tensor is None or f"\n  tensor: {tensor}\n" in message, message
        assert re.search(f"^  to do: .*{re.escape(remedy)}", message, re.MULTILINE), message
        assert result.stdout == ""
        assert os.path.lexists(place) == existed
        assert files_of(tmp_path, unfinished) == before
        assert code == RESOURCE or not unfinished.exists()  # nothing to go on with
        return result

    return check


def files_of(folder: Path, unfinished: Path) -> dict[str, bytes]:
    """Return every file of a test but those of an interrupted run."""
    return {name: raw for name, raw in snapshot(folder).items() if not name.startswith(f"{unfinished}{os.sep}")}


def change_config(model: Path, **fields: Any) -> Path:
    """Let a model's config say something else; return the file."""
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return file


def change_tensors(model: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors of a single-file checkpoint; None removes one."""
    table = {name: x for name, x in (read_checkpoint(model) | changes).items() if x is not None}
    save_file(table, model / "model.safetensors", {"format": "pt"})


# Ratios and options ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", ["-0.1", "1", "1.5", "nan", "inf", "60"])
def test_a_share_that_cannot_be_removed(m: Path, refuse: Refuse, ratio: str) -> None:
    refuse(words(m, ratio=ratio), USAGE, f"--kv-ratio {ratio} is no share", "0 ≤ ratio < 1")


@pytest.mark.parametrize("budget", ["0", "-0.5", "1.5", "nan"])
def test_a_share_that_cannot_be_kept(m: Path, refuse: Refuse, budget: str) -> None:
    refuse([m, "--kv-budget", budget], USAGE, "is no share that can be removed", "0 ≤ ratio < 1")


def test_a_ratio_that_no_rank_can_meet(m: Path, refuse: Refuse) -> None:
    cause = "removing 95% leaves 0.8 of 16 dimensions a head, and the least is 2"
    refuse(words(m, ratio="0.95"), USAGE, cause, "--kv-ratio 0.875 is the most")


def test_neither_or_both_of_ratio_and_budget(m: Path, refuse: Refuse) -> None:
    refuse([m], USAGE, "give one of kv_ratio and kv_budget", "--kv-ratio 0.6")
    refuse(words(m, "--kv-budget", "0.5"), USAGE, "give one of kv_ratio and kv_budget", "--kv-ratio 0.6")


@pytest.mark.parametrize(
    ("more", "cause", "remedy"),
    [
        (["--search", "fastest"], "--search fastest", "greedy, spectrum, uniform"),
        (["--export", "onnx"], "--export onnx", "remote-code"),
        (["--method", "matroshka"], "matroshka", "did you mean 'matryoshka'?"),
        (["-p", "warmpu=3"], "matryoshka has no parameter 'warmpu'", "did you mean 'warmup'?"),
        (["-p", "kl_weight=2"], "parameter kl_weight=2", "methods show matryoshka"),
        (["-p", "start=random"], "parameter start='random'", "methods show matryoshka"),
        (["-p", "learning_rate=0"], "parameter learning_rate=0", "methods show matryoshka"),
        (["-p", "warmup"], "not a parameter", "-p name=value"),
        (["--train-steps", "-1"], "train_steps -1", "at least 0"),
        (["--batch", "0"], "batch 0", "at least 1"),
        (["--length", "8"], "length 8", "at least 16"),
        (["--workers", "0"], "workers 0", "at least 1"),
        (["--dtype", "f33"], "f33", ""),
        (["--shard-size", "big"], "big", ""),
    ],
)
def test_options_that_mean_nothing(m: Path, refuse: Refuse, more: list[str], cause: str, remedy: str) -> None:
    refuse(words(m, *more), USAGE, cause, remedy)


@pytest.mark.parametrize("option", ["search", "export"])
def test_options_that_mean_nothing_in_python(m: Path, tmp_path: Path, option: str) -> None:
    before = snapshot(tmp_path)
    with pytest.raises(UsageError, match=f"{option} nosuch") as caught:
        basiscli.compress(m, kv_ratio=0.5, **{option: "nosuch"})  # type: ignore[misc]
    assert "one of " in str(caught.value.remedy)
    assert snapshot(tmp_path) == before


# Models without a cache, or with another one --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "bert: BertForMaskedLM generates no text"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "t5: encoder-decoder models have two caches"),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, "multi-head latent attention (MLA)"),
        ({"model_type": "gemma2", "attn_logit_softcapping": 50.0}, "soft-capped logits"),
        ({"layer_types": ["linear_attention", "full_attention", "full_attention"]}, "layers of kind linear_attention"),
        ({"layer_types": ["chunked_attention"] * 3}, "layers of kind chunked_attention"),
        ({"num_kv_shared_layers": 2}, "layers that share one cache"),
        ({"quantization_config": {"quant_method": "gptq"}}, "the weights are quantised"),
        ({"text_config": {"kv_lora_rank": 512}}, "multi-head latent attention (MLA)"),
    ],
)
def test_models_whose_cache_is_another(m: Path, refuse: Refuse, fields: dict[str, Any], cause: str) -> None:
    file = change_config(m, **fields)
    refuse(words(m), INPUT, cause, "multi-head or grouped-query attention", file=file)


def test_a_model_that_brings_its_own_code(m: Path, refuse: Refuse) -> None:
    file = change_config(m, auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    (m / "modeling_own.py").write_text("raise SystemExit('run')")
    refuse(words(m), INPUT, "its own code, which is not run", "an architecture that transformers has", file=file)


def test_a_model_type_that_transformers_does_not_know(m: Path, refuse: Refuse) -> None:
    change_config(m, model_type="nosuch")
    refuse(words(m), INPUT, "transformers does not load it", "AutoModelForCausalLM loads", file=m)


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"num_attention_heads": None}, "does not say how large the KV cache is"),
        ({"num_attention_heads": "four"}, "does not say how large the KV cache is"),
        ({"num_attention_heads": 0, "head_dim": None}, "does not say how large the KV cache is"),
        ({"num_hidden_layers": 0}, "a cache of 0 layers"),
        ({"head_dim": 1}, "2 KV heads of 1 dimensions"),
        ({"num_key_value_heads": -2}, "-2 KV heads"),
    ],
)
def test_a_config_that_describes_no_cache(m: Path, refuse: Refuse, fields: dict[str, Any], cause: str) -> None:
    file = change_config(m, **fields)
    refuse(words(m), INPUT, cause, "give a complete config", file=file)


def test_no_config(m: Path, refuse: Refuse) -> None:
    (m / "config.json").unlink()
    refuse(words(m), INPUT, "no config.json beside the weights", "a complete model folder", file=m / "config.json")


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_a_config_that_is_no_table(m: Path, refuse: Refuse, text: str) -> None:
    (m / "config.json").write_text(text)
    refuse(words(m), INPUT, "not ", "restore the file", file=m / "config.json")


@pytest.mark.parametrize("fields", [{"num_key_value_heads": 4}, {"num_key_value_heads": 1}, {"head_dim": 8}])
def test_a_config_with_another_number_of_heads_than_the_weights(
    m: Path, refuse: Refuse, fields: dict[str, int]
) -> None:
    change_config(m, **fields)
    refuse(words(m), INPUT, "", "", file=m)


def test_a_config_with_fields_of_the_wrong_kind(m: Path, refuse: Refuse) -> None:
    change_config(m, vocab_size="many")
    refuse(words(m), INPUT, "transformers does not load it", "", file=m)


def test_a_config_with_more_layers_than_the_weights(m: Path, refuse: Refuse) -> None:
    change_config(m, num_hidden_layers=4)
    tensor = "model.layers.3.input_layernorm.weight"
    refuse(words(m), INPUT, "9 weights are missing", "download the checkpoint again", file=m, tensor=tensor)


# Weights --------------------------------------------------------------------------------------------------------------


def test_a_missing_weight(m: Path, refuse: Refuse) -> None:
    change_tensors(m, **{KEYS: None})
    refuse(words(m), INPUT, "1 weights are missing in the checkpoint", "download", file=m, tensor=KEYS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [KEYS, "model.norm.weight", "model.embed_tokens.weight"])
def test_weights_that_are_no_numbers(m: Path, refuse: Refuse, name: str, value: float) -> None:
    spoilt = read_checkpoint(m)[name].clone()
    spoilt.view(-1)[-1] = value  # also the last token's embedding, which no text has
    change_tensors(m, **{name: spoilt})
    refuse(words(m), INPUT, "the weights have a NaN or Inf", "mend the checkpoint", file=m, tensor=name)


def test_no_weights(m: Path, refuse: Refuse) -> None:
    (m / "model.safetensors").unlink()
    refuse(words(m), INPUT, "no weights here", "the folder of a checkpoint", file=m)


def test_a_truncated_file_of_weights(m: Path, refuse: Refuse) -> None:
    file = m / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refuse(words(m), INPUT, "truncated", "download or save", file=file)


def test_a_missing_shard(m: Path, refuse: Refuse) -> None:
    tensors = read_checkpoint(m)
    (m / "model.safetensors").unlink()
    config, tokenizer = (m / "config.json").read_text(), (m / "tokenizer.json").read_text()
    write_checkpoint(m, tensors, json.loads(config), shards=3)
    (m / "tokenizer.json").write_text(tokenizer)
    (m / "model-00002-of-00003.safetensors").unlink()
    refuse(words(m), INPUT, "model-00002-of-00003.safetensors, and that file is missing", "download")


def test_weights_that_transformers_would_not_load(m: Path, refuse: Refuse, tmp_path: Path) -> None:
    """The model runs as transformers loads it from its folder: what is written must be the same weights."""
    other = m / "model.other.safetensors"
    save_file({name: x + 1 for name, x in read_checkpoint(m).items()}, other, {"format": "pt"})
    text = tmp_path / "text.txt"
    refuse(words(other, text=text), INPUT, "these weights are not in model.safetensors", "save_pretrained", file=other)
    other.unlink()
    torch.save(read_checkpoint(m), m / "pytorch_model.bin")
    (m / "model.safetensors").unlink()
    refuse(words(m), INPUT, "these weights are not in model.safetensors", "save_pretrained", file=m)


def test_an_adapter(m: Path, refuse: Refuse, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    save_file({"base_model.model.x.lora_A.weight": torch.ones(4, 8)}, adapter / "adapter_model.safetensors")
    refuse(words(adapter), INPUT, "an adapter has no KV cache", "basis expand ADAPTER", file=adapter)


def test_a_folder_that_is_not_there(tmp_path: Path, refuse: Refuse, m: Path) -> None:
    refuse(words(tmp_path / "nosuch"), INPUT, "no such model", "give a folder")


def test_values_that_cannot_be_folded_are_refused_before_the_training(
    m: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-NeoX has one projection for queries, keys and values of each head in turn."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    shutil.rmtree(m)
    small = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    save_model(m, GPTNeoXForCausalLM(GPTNeoXConfig(**small, num_attention_heads=4, max_position_embeddings=64)))
    monkeypatch.setattr(KVRun, "_find", lambda _: pytest.fail("the work began"))
    refuse(words(m, "--fold-v"), INPUT, "no such weight", "leave out --fold-v", file=m)


# An earlier projection ------------------------------------------------------------------------------------------------


@pytest.fixture
def earlier(m: Path, basis: Basis, tmp_path: Path) -> Path:
    """Return an earlier result."""
    assert basis("compress", *words(m), "-o", tmp_path / "earlier").exit_code == 0
    return tmp_path / "earlier"


def test_a_projection_of_another_model(earlier: Path, refuse: Refuse, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", llama(num_hidden_layers=2))
    for name in ("kv_projection.json", "kv_projection.safetensors"):
        shutil.copy(earlier / name, other)
    refuse(words(other), INPUT, "is another model's", "remove kv_projection.*", file=other)


@pytest.mark.parametrize(
    ("change", "cause", "remedy"),
    [
        ({"format": 99}, "KV projection of format 99", "update basis"),
        ({"key_ranks": [[17, 2]] * 3}, "the ranks fit no KV cache", "basis compress"),
        ({"key_ranks": [[0, 2]] * 3}, "the ranks fit no KV cache", "basis compress"),
        ({"key_ranks": []}, "the ranks fit no KV cache", "basis compress"),
        ({"key_ranks": "all"}, "damaged: key_ranks", "basis compress"),
        ({"levels": 0}, "the ranks fit no KV cache", "basis compress"),
    ],
)
def test_a_damaged_projection(earlier: Path, refuse: Refuse, change: dict[str, Any], cause: str, remedy: str) -> None:
    file = earlier / "kv_projection.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    refuse(words(earlier), INPUT, cause, remedy, file=file)


def test_a_projection_without_its_bases(earlier: Path, refuse: Refuse) -> None:
    file = earlier / "kv_projection.safetensors"
    raw = file.read_bytes()
    file.unlink()
    refuse(words(earlier), INPUT, "no KV projection", "", file=file)
    file.write_bytes(raw[:-4])
    refuse(words(earlier), INPUT, "truncated", "", file=file)


# Calibration ----------------------------------------------------------------------------------------------------------


def test_calibration_that_is_not_there(m: Path, refuse: Refuse, tmp_path: Path) -> None:
    nosuch = tmp_path / "nosuch.txt"
    refuse(words(m, text=nosuch), INPUT, "no such calibration file", "check the path", file=nosuch)


@pytest.mark.parametrize(
    ("text", "cause", "remedy"),
    [
        ("", "no text in the calibration data", "--calibration"),
        ("short", "has 6 tokens, fewer than one window of 32", "--calibration"),
        ("x" * 50, "one window of 32 tokens, and at least two are needed", "smaller --length"),
    ],
)
def test_too_little_calibration(m: Path, refuse: Refuse, tmp_path: Path, text: str, cause: str, remedy: str) -> None:
    (tmp_path / "text.txt").write_text(text)
    refuse(words(m), INPUT, cause, remedy, file=tmp_path / "text.txt")


def test_calibration_that_cannot_be_read(m: Path, refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"\xff\xfe" * 500)
    refuse(words(m), INPUT, "not readable as UTF-8", "--calibration", file=tmp_path / "text.txt")
    lines = tmp_path / "text.jsonl"
    lines.write_text('{"text": "good"}\n{"txt": "bad"}\n')
    refuse(words(m, text=lines), INPUT, "line 2: neither a `text`", "one {", file=lines)
    tokens = tmp_path / "tokens.safetensors"
    save_file({"input_ids": torch.full((3, 32), 1000)}, tokens)
    cause = "token id 1000 is outside the model's vocabulary of 260"
    refuse(words(m, text=tokens), INPUT, cause, "make them with this model's", file=tokens)


@pytest.mark.parametrize("raw", [None, b"{}", b"\xff\xfe\x00", b"{"])
def test_a_tokenizer_that_does_not_load(m: Path, refuse: Refuse, raw: bytes | None) -> None:
    (m / "tokenizer.json").unlink()
    if raw is not None:
        (m / "tokenizer.json").write_bytes(raw)
    refuse(words(m), INPUT, "no tokenizer that loads", "--calibration tokens.safetensors", file=m)


def test_tokens_need_no_tokenizer(m: Path, basis: Basis, tmp_path: Path) -> None:
    (m / "tokenizer.json").unlink()
    (m / "tokenizer_config.json").unlink()
    tokens = tmp_path / "tokens.safetensors"
    save_file({"input_ids": torch.randint(0, 256, (6, 40))}, tokens)
    result = basis("compress", *words(m, text=tokens))
    assert result.exit_code == 0, result.stderr
    assert basiscli.load(tmp_path / "m-kv0.5")[1] is None


def test_a_learning_rate_that_leads_astray(m: Path, refuse: Refuse) -> None:
    refuse(words(m, "-p", "learning_rate=1e30"), USAGE, "parameter learning_rate=1e+30", "basis methods show")


# Outputs --------------------------------------------------------------------------------------------------------------


def test_an_output_that_exists(m: Path, refuse: Refuse, out: Path) -> None:
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    refuse(words(m), USAGE, "the output exists", "--overwrite", file=out)
    refuse(words(m, "--overwrite"), USAGE, "was not written by basis", "remove it yourself", file=out)
    shutil.rmtree(out)
    out.write_text("a file")
    refuse(words(m), USAGE, "the output is a file", "another -o", file=out)


def test_an_output_inside_the_input_or_around_it(m: Path, refuse: Refuse, tmp_path: Path) -> None:
    refuse(words(m, "-o", m / "kv"), USAGE, "would lie inside an input", "another -o", file=m)
    refuse(words(m, "-o", m), USAGE, "would lie inside an input", "another -o", file=m)
    refuse(words(m, "-o", tmp_path), USAGE, "would hold an input", "another -o", file=m)


def test_a_result_is_not_overwritten_by_its_own_compression(earlier: Path, refuse: Refuse) -> None:
    refuse(words(earlier, "-o", earlier, "--overwrite"), USAGE, "would lie inside an input", "another -o", file=earlier)


def test_an_export_of_a_model_that_names_no_architecture(
    m: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KVRun, "run", lambda _: pytest.fail("the work began"))
    change_config(m, architectures=None)
    refuse(words(m, "--export", "remote-code"), INPUT, "names no architecture", "leave out --export")


# Disk and memory ------------------------------------------------------------------------------------------------------


def test_not_enough_disk_space(m: Path, refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    refuse(words(m), RESOURCE, "not enough disk space", "free some space", file=tmp_path)


def made(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in MADE}


@pytest.mark.parametrize(("call", "step"), [("posix_fallocate", 1), ("pwrite", 9), ("write", 9), ("fsync", 3)])
def test_a_disk_that_fills_up_at_any_moment(
    m: Path, refuse: Refuse, basis: Basis, tmp_path: Path, call: str, step: int
) -> None:
    command = words(m, "--workers", "1")
    with full_disk(call, 10**9) as seen:
        assert basis("compress", *command, "-o", tmp_path / "whole").exit_code == 0
    moments = len(seen) - (1 if call == "fsync" else 0)  # the last fsync follows the renaming
    assert moments >= 1
    for after in range(0, moments, step):
        out = tmp_path / f"out{after}"
        with full_disk(call, after):
            refuse([*command, "-o", out], RESOURCE, "No space left on device", "the same command goes on")
        result = basis("compress", *command, "-o", out)
        assert result.exit_code == 0, result.stderr
        assert made(out) == made(tmp_path / "whole")
        assert sorted(f.name for f in out.iterdir()) == sorted(f.name for f in (tmp_path / "whole").iterdir())


def test_no_room_for_the_state_of_the_training(
    m: Path, refuse: Refuse, basis: Basis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def no_new_file(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if "training." in Path(path).name and flags & os.O_CREAT:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, flags, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", no_new_file)
        refuse(words(m), RESOURCE, "No space left on device", "free some space")
    assert basis("compress", *words(m), "-o", tmp_path / "out").exit_code == 0


def test_a_device_that_is_not_there(m: Path, refuse: Refuse) -> None:
    refuse(words(m, "--device", "tpu"), RESOURCE, "no device 'tpu'", "--device cpu")


def test_memory_that_runs_out(m: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("basiscli.commands.kv.run.Training.run", fail)
    refuse(words(m), RESOURCE, "out of memory", "a smaller --batch or --length")
