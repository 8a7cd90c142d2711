"""Folders with a KV projection: loaded by basis, loaded by transformers alone, and refused when they are damaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import basiscli
from basiscli.checkpoints.kv_file import BASES_FILE, CONFIG_FILE, read_kv_bases
from basiscli.errors import InputError
from basiscli.runtime.export import exported_files, without_export
from basiscli.runtime.kv_projection import ATTENTION
from tests.runtime.conftest import (
    CLOSE,
    Cut,
    difference,
    in_chunks,
    make_dense,
    reference_logits,
    texts,
    write_compressed,
)

# Architecture, and whether the values are folded into the weights.
EXPORTED = {"llama_gqa": False, "llama_bias": True, "gemma3": False, "phi3": False, "qwen2_mixed": True}
NEW = 12

# Run by a Python that cannot import basiscli: what transformers gives of each folder in the working directory.
_ALONE = """
import json, sys
from importlib.abc import MetaPathFinder
from inspect import signature
from pathlib import Path

class Blocked(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("basiscli", "basis_plugins"):
            raise ImportError(f"{name} is not to be had here")

sys.meta_path.insert(0, Blocked())
try:
    import basiscli
except ImportError:
    pass
else:
    sys.exit("basiscli can be imported")

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

found, facts = {}, {}
inputs = load_file("inputs.safetensors")["ids"]
for folder in sorted(Path().glob("*/")):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    dense = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    options = {"trust_remote_code": True, "dtype": "bfloat16", "output_loading_info": True}
    half, info = AutoModelForCausalLM.from_pretrained(folder, **options)
    cache = DynamicCache(config=model.config)
    given = {name: cache for name in ("cache", "past_key_values") if name in signature(model.forward).parameters}
    with torch.no_grad():
        found[f"{folder}.logits"] = model(input_ids=inputs, use_cache=False).logits
        parts = inputs.split([14, 1, 1, 13], 1)
        found[f"{folder}.cached"] = torch.cat([model(input_ids=x, **given).logits for x in parts], 1)
        found[f"{folder}.dense"] = dense(input_ids=inputs, use_cache=False).logits
        found[f"{folder}.bfloat16"] = half(input_ids=inputs, use_cache=False).logits
    mask = torch.ones_like(inputs[:, :12])
    greedy = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    found[f"{folder}.tokens"] = model.generate(inputs[:, :12], **greedy)
    found[f"{folder}.static"] = model.generate(inputs[:, :12], cache_implementation="static", **greedy)
    facts[str(folder)] = {
        "cache": type(cache).__name__,
        "widths": [[x.keys.shape[1] * x.keys.shape[-1], x.values.shape[1] * x.values.shape[-1]] for x in cache.layers],
        "class": type(model).__name__,
        "dense module": type(dense).__module__,
        "dense attention": dense.config._attn_implementation,
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "basis modules": [name for name in sys.modules if name.partition(".")[0] == "basiscli"],
    }
save_file(found, "found.safetensors")
Path("facts.json").write_text(json.dumps(facts))
"""


class Alone:
    """What a process without basiscli found."""

    def __init__(self, place: Path, models: dict[str, tuple[Any, Cut]]) -> None:
        self.place, self.models = place, models
        self.tensors = load_file(place / "found.safetensors")
        self.facts = json.loads((place / "facts.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """Load every exported folder in one process of its own."""
    place, home = tmp_path_factory.mktemp("exported"), tmp_path_factory.mktemp("home")
    models = {name: write_compressed(place / name, name, folded=folded) for name, folded in EXPORTED.items()}
    save_file({"ids": texts(2)}, place / "inputs.safetensors")
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_HUB_CACHE")}
    env |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(home / "modules")}
    ran = subprocess.run(
        [sys.executable, "-c", _ALONE], cwd=place, env=env, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return Alone(place, models)


# Plain transformers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPORTED)
def test_transformers_alone_gives_the_logits_of_basis_and_of_the_reference(alone: Alone, name: str) -> None:
    dense, cut = alone.models[name]
    model, _ = basiscli.load(alone.place / name)
    expected = model(input_ids=texts(2), use_cache=False).logits
    for found in (alone.tensors[f"{name}.logits"], alone.tensors[f"{name}.cached"]):
        assert difference(found, expected) <= CLOSE
        assert difference(found, reference_logits(dense, cut, texts(2))) <= CLOSE


@pytest.mark.parametrize("name", EXPORTED)
def test_transformers_alone_generates_the_tokens_of_basis(alone: Alone, name: str) -> None:
    model, _ = basiscli.load(alone.place / name)
    ids = texts(2)[:, :12]
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    assert torch.equal(alone.tensors[f"{name}.tokens"], expected)
    assert torch.equal(alone.tensors[f"{name}.static"], expected)


@pytest.mark.parametrize("name", EXPORTED)
def test_transformers_alone_has_a_stock_cache_of_coefficients(alone: Alone, name: str) -> None:
    facts, (_, cut) = alone.facts[name], alone.models[name]
    assert facts["cache"] == "DynamicCache"
    assert facts["widths"] == [list(pair) for pair in cut.widths]
    assert facts["class"] == "BasisKVForCausalLM"
    assert facts["basis modules"] == []
    assert facts["missing"] == facts["unexpected"] == []


@pytest.mark.parametrize("name", EXPORTED)
def test_without_trust_the_folder_is_the_dense_model(alone: Alone, name: str) -> None:
    dense, _ = alone.models[name]
    assert difference(alone.tensors[f"{name}.dense"], dense(input_ids=texts(2)).logits) <= CLOSE
    assert alone.facts[name]["dense attention"] != ATTENTION
    assert alone.facts[name]["dense module"].startswith("transformers.models.")


@pytest.mark.parametrize("name", EXPORTED)
def test_options_of_from_pretrained_reach_the_model(alone: Alone, name: str) -> None:
    dense, cut = alone.models[name]
    found, expected = alone.tensors[f"{name}.bfloat16"], reference_logits(dense, cut, texts(2))
    assert found.dtype == torch.bfloat16
    # What rounding does to the dense models, too (see test_kv_projection); a wrong basis shows as 1.
    assert difference(found, expected) < 0.1


def test_a_config_without_an_architecture_is_not_exported() -> None:
    for table in ({}, {"architectures": []}, {"architectures": ["no name; import os"]}):
        with pytest.raises(InputError, match="names no architecture"):
            exported_files(json.dumps(table).encode())


def test_an_export_is_undone() -> None:
    plain = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    exported = exported_files(json.dumps(plain).encode())
    assert sorted(exported) == ["basis_kv_projection.py", "config.json", "modeling_basis_kv.py"]
    assert json.loads(without_export(exported["config.json"])) == plain
    other = json.dumps(plain | {"auto_map": {"AutoModel": "theirs.Model"}}).encode()
    assert without_export(other) == other


# basiscli.load --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a compressed folder."""
    write_compressed(tmp_path / "model", "llama_gqa")
    return tmp_path / "model"


def test_a_folder_without_a_projection_is_loaded_as_it_is(folder: Path) -> None:
    (folder / CONFIG_FILE).unlink()
    (folder / BASES_FILE).unlink()
    model, tokenizer = basiscli.load(folder)
    assert tokenizer is None
    assert model.config._attn_implementation != ATTENTION
    expected = make_dense("llama_gqa")(input_ids=texts()).logits
    assert difference(in_chunks(model, texts(), [20, 9]), expected) <= CLOSE


def test_a_prompt_is_compressed_or_exact(tmp_path: Path) -> None:
    dense, cut = write_compressed(tmp_path, "gemma3")
    for prefill, prompt in (("compressed", 0), ("exact", 14)):
        model, _ = basiscli.load(tmp_path, prefill=prefill)
        expected = reference_logits(dense, cut, texts(), prompt=prompt)
        assert difference(in_chunks(model, texts(), [14, 1, 1, 13]), expected) <= CLOSE


def test_a_loaded_model_is_for_inference_in_the_dtype_that_was_asked_for(folder: Path) -> None:
    for dtype, expected in ((None, torch.float32), ("bfloat16", torch.bfloat16), (torch.float16, torch.float16)):
        model, _ = basiscli.load(folder, dtype=dtype, device="cpu")
        assert {weight.dtype for weight in model.parameters()} == {expected}
        assert not model.training
        assert not any(weight.requires_grad for weight in model.parameters())


def test_what_was_written_is_read(tmp_path: Path) -> None:
    _, cut = write_compressed(tmp_path, "phi3")
    found = read_kv_bases(tmp_path)
    assert torch.equal(found.bases, cut.bases)
    assert (found.config.key_ranks, found.config.value_ranks) == (cut.key_ranks, cut.value_ranks)


# Damage ---------------------------------------------------------------------------------------------------------------


def _in_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        table = json.loads((folder / CONFIG_FILE).read_text())
        change(table)
        (folder / CONFIG_FILE).write_text(json.dumps(table))

    return damage


def _in_tensors(file: str, change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file({name: x.contiguous() for name, x in tensors.items()}, folder / file, {"format": "pt"})

    return damage


def _cut_short(folder: Path) -> None:
    content = (folder / BASES_FILE).read_bytes()
    (folder / BASES_FILE).write_bytes(content[:-100])


def _of_another_model(name: str, **changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        other = folder.parent / "other"
        write_compressed(other, name, **changes)
        for file in (CONFIG_FILE, BASES_FILE):
            (folder / file).write_bytes((other / file).read_bytes())

    return damage


# What is done to a folder, what the error says, and the file and tensor that it names.
DAMAGE: dict[str, tuple[Callable[[Path], None], str, str, str | None]] = {
    "no JSON": (lambda f: (f / CONFIG_FILE).write_text("{"), "not valid JSON", CONFIG_FILE, None),
    "no object": (lambda f: (f / CONFIG_FILE).write_text("[]"), "not a JSON object", CONFIG_FILE, None),
    "no ranks": (_in_config(lambda t: t.pop("key_ranks")), "key_ranks", CONFIG_FILE, None),
    "a newer format": (_in_config(lambda t: t.update(format=99)), "format 99", CONFIG_FILE, None),
    "rank 0": (_in_config(lambda t: t["key_ranks"][1].__setitem__(0, 0)), "fit no KV cache", CONFIG_FILE, None),
    "rank over d": (_in_config(lambda t: t["value_ranks"][0].__setitem__(2, 9)), "fit no KV", CONFIG_FILE, None),
    "a head less": (_in_config(lambda t: t["value_ranks"][0].pop()), "fit no KV cache", CONFIG_FILE, None),
    "layers of keys only": (_in_config(lambda t: t["value_ranks"].pop()), "fit no KV cache", CONFIG_FILE, None),
    "no layers": (_in_config(lambda t: t.update(key_ranks=[], value_ranks=[])), "fit no KV", CONFIG_FILE, None),
    "no bases": (lambda f: (f / BASES_FILE).unlink(), "no KV projection", BASES_FILE, None),
    "a file that ends early": (_cut_short, "truncated", BASES_FILE, "layers.2.values.energy"),
    "no basis of a layer": (
        _in_tensors(BASES_FILE, lambda t: t.pop("layers.1.values")),
        "no float32 tensor of shape [4, 8, 8]",
        BASES_FILE,
        "layers.1.values",
    ),
    "a basis of fewer columns": (
        _in_tensors(BASES_FILE, lambda t: t.update({"layers.2.keys": t["layers.2.keys"][..., :4]})),
        "no float32 tensor of shape [4, 8, 8]",
        BASES_FILE,
        "layers.2.keys",
    ),
    "a basis in half precision": (
        _in_tensors(BASES_FILE, lambda t: t.update({"layers.0.keys": t["layers.0.keys"].half()})),
        "no float32 tensor",
        BASES_FILE,
        "layers.0.keys",
    ),
    "no weight": (
        _in_tensors("model.safetensors", lambda t: t.pop("model.layers.1.self_attn.v_proj.weight")),
        "1 weights are missing",
        "",
        "model.layers.1.self_attn.v_proj.weight",
    ),
    # Bases of one head would fit any number of heads.
    "another model": (_of_another_model("gemma3"), "is of another model: 3 layers with 1 KV heads", CONFIG_FILE, None),
    "fewer layers": (
        _in_config(lambda t: (t["key_ranks"].pop(), t["value_ranks"].pop())),
        "is of another model: 2 layers with 4 KV heads of 8 dimensions, and the model has 3 layers",
        CONFIG_FILE,
        None,
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_folder_is_refused_by_file_and_tensor(folder: Path, kind: str) -> None:
    damage, what, file, tensor = DAMAGE[kind]
    basiscli.load(folder)
    damage(folder)
    with pytest.raises(InputError) as caught:
        basiscli.load(folder)
    error = caught.value
    assert what in error.what
    assert error.file == str(folder / file)
    assert error.tensor == tensor
    assert error.remedy
