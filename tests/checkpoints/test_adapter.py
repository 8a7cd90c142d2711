"""LoRA adapters as basis reads and merges them, against PEFT's own merge of the same files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoHaConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import basiscli
from basiscli import HubError, InputError, UsageError
from basiscli.checkpoints.adapter import Adapter, AdapterView
from basiscli.checkpoints.source import resolve, resolve_base
from basiscli.checkpoints.views import Checkpoint
from tests.conftest import Tensors, basis_process, read_checkpoint, write_checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft 0.21
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    # peft 0.21 takes the bias that `lora_bias` trains for a factor of a wrong shape.
    pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape.*lora_B.bias"),
]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QUERY = "model.layers.0.self_attn.q_proj"

Make = Callable[[], nn.Module]


def llama(**options: Any) -> nn.Module:
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | heads | options))


def gpt2() -> nn.Module:
    sizes = {"vocab_size": 60, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


BERT = transformers.BertConfig(
    vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
)


def bert() -> nn.Module:
    return transformers.BertModel(BERT)


def bert_classifier() -> nn.Module:
    return transformers.BertForSequenceClassification(BERT)


def t5() -> nn.Module:
    sizes = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


def save_base(make: Make, folder: Path) -> Path:
    torch.manual_seed(0)
    make().save_pretrained(folder)
    return folder


def load(base: Path) -> Any:
    """Load a base by the class that its config names."""
    name = json.loads((base / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(base)


def train_at_random(model: nn.Module, seed: int = 1, std: float = 0.1) -> None:
    """Give everything that PEFT would train random values."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=std, generator=generator)


def make_adapter(base: Path, adapter: Path, config: PeftConfig, **training: Any) -> Tensors:
    """Write an adapter of a base with PEFT, and return what PEFT merges the two to."""
    model = get_peft_model(load(base), config)
    train_at_random(model, **training)
    model.save_pretrained(adapter)
    return dict(model.merge_and_unload().state_dict())


def view(adapter: Path, base: Path) -> AdapterView:
    return AdapterView(Adapter(resolve(str(adapter))), Checkpoint.open(resolve(str(base))))


def assert_same(found: Tensor, expected: Tensor, name: str) -> None:
    distance, length = (found - expected).norm(), expected.norm()
    assert found.shape == expected.shape, name
    assert distance <= 1e-6 * length, f"{name}: off by {distance / length:.1e} of its length"


def change_config(adapter: Path, **options: Any) -> None:
    file = adapter / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | options))


def change_weights(adapter: Path, **changes: Tensor | None) -> None:
    """Replace tensors of an adapter; None removes one."""
    tensors = load_file(adapter / WEIGHTS) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, adapter / WEIGHTS)


# Reading --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """A base, an adapter of it, and what PEFT merges them to."""

    base: Path
    adapter: Path
    expected: Tensors


PATTERNS = {
    "rank_pattern": {
        "layers.1.self_attn.q_proj": 2,
        r"layers\.\d+\.mlp\.(up|down)_proj": 5,
        "^model.layers.0.mlp.gate_proj": 3,
        "k_proj|o_proj": 6,
    },
    "alpha_pattern": {"q_proj": 3, ".*0.mlp.up_proj": 11, r"model\.layers\.0\.mlp\..*": 13},
}
KINDS: dict[str, tuple[Make, dict[str, Any]]] = {
    "plain": (llama, {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "rslora": (llama, {"target_modules": "all-linear", "use_rslora": True}),
    "patterns": (llama, {"target_modules": "all-linear", **PATTERNS}),
    "rslora-patterns": (llama, {"target_modules": "all-linear", "use_rslora": True, **PATTERNS}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d-square": (gpt2, {"target_modules": r".*attn\.c_proj", "fan_in_fan_out": True}),
    "conv1d-embeddings": (gpt2, {"target_modules": ["wte", "wpe", "c_attn"], "fan_in_fan_out": True}),
    "embeddings": (bert, {"target_modules": ["word_embeddings", "position_embeddings", "query"]}),
    "embed_tokens": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "lm_head": (llama, {"target_modules": ["lm_head", "q_proj"]}),
    "bias-all": (bert, {"target_modules": ["query", "dense"], "bias": "all"}),
    "bias-lora-only": (bert, {"target_modules": ["query", "dense"], "bias": "lora_only"}),
    "lora-bias": (bert, {"target_modules": ["query", "dense"], "lora_bias": True}),
    "lora-bias-rslora": (bert, {"target_modules": ["query"], "lora_bias": True, "use_rslora": True}),
    "modules-to-save": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm", "embed_tokens"]}),
    "classifier": (bert_classifier, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "t5": (t5, {"target_modules": ["q", "v", "o", "wi", "wo"]}),
    "t5-shared-embedding": (t5, {"target_modules": ["shared", "q"]}),
}


@pytest.fixture(scope="module", params=KINDS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    make, options = KINDS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    base = save_base(make, folder / "base")
    expected = make_adapter(base, folder / "adapter", LoraConfig(**{"r": 4, "lora_alpha": 12} | options))
    return Trained(base, folder / "adapter", expected)


def test_an_adapter_reads_as_pefts_own_merge(trained: Trained) -> None:
    found, base = view(trained.adapter, trained.base), read_checkpoint(trained.base)
    for name in base:
        assert_same(found.read(name), trained.expected[name], name)
        assert found.changes(name) == (not torch.equal(trained.expected[name], base[name])), name
    assert found.tensors.keys() == base.keys()


def test_rows_are_those_of_the_whole(trained: Trained) -> None:
    found = view(trained.adapter, trained.base)
    for name in found.tensors:
        rows = slice(1, found.tensors[name].shape[0] // 2 + 1)
        assert_same(found.read(name, rows), found.read(name)[rows], name)


def test_convolutions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"line": nn.Conv1d(4, 6, 3), "plane": nn.Conv2d(6, 8, (3, 2)), "point": nn.Conv2d(8, 5, 1)})
    write_checkpoint(tmp_path / "base", net.state_dict(), config={})
    model = get_peft_model(net, LoraConfig(r=3, lora_alpha=7, target_modules=["line", "plane", "point"]))
    train_at_random(model)
    model.save_pretrained(tmp_path / "adapter")
    found = view(tmp_path / "adapter", tmp_path / "base")
    for name, tensor in model.merge_and_unload().state_dict().items():
        assert_same(found.read(name), tensor, name)
        assert_same(found.read(name, slice(1, 3)), tensor[1:3], name)


def test_a_head_that_stays_tied_to_a_replaced_embedding(tmp_path: Path) -> None:
    base = save_base(lambda: llama(tie_word_embeddings=True), tmp_path / "base")
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    expected = make_adapter(base, tmp_path / "adapter", config)
    found = view(tmp_path / "adapter", base)
    for name in found.tensors:
        assert_same(found.read(name), expected[name], name)


def test_an_adapter_in_a_pickle(tmp_path: Path) -> None:
    base = save_base(llama, tmp_path / "base")
    expected = make_adapter(base, tmp_path / "adapter", LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]))
    torch.save(load_file(tmp_path / "adapter" / WEIGHTS), tmp_path / "adapter" / "adapter_model.bin")
    (tmp_path / "adapter" / WEIGHTS).unlink()
    found = view(tmp_path / "adapter", base)
    for name in found.tensors:
        assert_same(found.read(name), expected[name], name)


def test_a_base_saved_without_its_head_has_shorter_names(tmp_path: Path) -> None:
    whole = save_base(llama, tmp_path / "whole")
    load(whole).model.save_pretrained(tmp_path / "body")
    expected = make_adapter(whole, tmp_path / "adapter", LoraConfig(target_modules="all-linear", bias="all"))
    found = view(tmp_path / "adapter", tmp_path / "body")
    assert "layers.0.self_attn.q_proj.weight" in found.tensors
    for name in found.tensors:
        assert_same(found.read(name), expected[f"model.{name}"], name)


def test_an_adapter_trained_without_the_head_has_shorter_names(tmp_path: Path) -> None:
    whole = save_base(llama, tmp_path / "whole")
    load(whole).model.save_pretrained(tmp_path / "body")
    expected = make_adapter(tmp_path / "body", tmp_path / "adapter", LoraConfig(target_modules=["q_proj", "up_proj"]))
    found = view(tmp_path / "adapter", whole)
    for name in found.tensors.keys() - {HEAD}:
        assert_same(found.read(name), expected[name.removeprefix("model.")], name)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning")
def test_pissa_converted_to_plain_lora(tmp_path: Path) -> None:
    base = save_base(llama, tmp_path / "base")
    model = get_peft_model(load(base), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    train_at_random(model)
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    expected = model.merge_and_unload().state_dict()
    found = view(tmp_path / "adapter", base)
    for name in found.tensors:
        torch.testing.assert_close(found.read(name), expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_how_the_factors_began_does_not_matter_where_the_base_stays(tmp_path: Path, start: bool | str) -> None:
    base = save_base(llama, tmp_path / "base")
    expected = make_adapter(base, tmp_path / "adapter", LoraConfig(target_modules=["q_proj"]))
    change_config(tmp_path / "adapter", init_lora_weights=start)
    assert_same(view(tmp_path / "adapter", base).read(f"{QUERY}.weight"), expected[f"{QUERY}.weight"], QUERY)


# Refusing -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(llama, tmp_path / "base")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """Return a plain adapter of `base`, for a test to spoil."""
    make_adapter(base, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    return tmp_path / "adapter"


def refusal(adapter: Path, base: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        view(adapter, base)
    return caught.value


UNREADABLE: dict[str, tuple[PeftConfig, str]] = {
    "dora": (LoraConfig(target_modules=["q_proj"], use_dora=True), "use_dora is set"),
    "loha": (LoHaConfig(target_modules=["q_proj"]), "this is a LOHA adapter"),
    "pissa": (LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
    "pissa-fast": (LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa_niter_2"), "'pissa_niter_2'"),
    "olora": (LoraConfig(target_modules=["q_proj"], init_lora_weights="olora"), "init_lora_weights is 'olora'"),
    "layers": (LoraConfig(target_modules=["q_proj"], layer_replication=[(0, 2), (1, 2)]), "layer_replication is set"),
    "tokens": (
        LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 2]}),
        "trainable_token_indices is set",
    ),
    "parameters": (
        LoraConfig(target_modules=["q_proj"], target_parameters=["mlp.up_proj.weight"]),
        "target_parameters is set",
    ),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_variant_that_is_no_product_of_two_factors(base: Path, tmp_path: Path, kind: str) -> None:
    config, reason = UNREADABLE[kind]
    get_peft_model(load(base), config).save_pretrained(tmp_path / "adapter")
    error = refusal(tmp_path / "adapter", base)
    assert reason in error.what
    assert error.file == str(tmp_path / "adapter" / CONFIG)
    assert error.remedy is not None and "PEFT" in error.remedy


@pytest.mark.parametrize(
    "options",
    [{"init_lora_weights": "corda"}, {"init_lora_weights": "loftq"}, {"peft_type": None}, {"use_qalora": True}],
)
def test_a_variant_that_only_the_config_tells(adapter: Path, base: Path, options: dict[str, Any]) -> None:
    change_config(adapter, **options)
    error = refusal(adapter, base)
    assert str(next(iter(options.values()))) in error.what or next(iter(options)) in error.what
    assert error.file == str(adapter / CONFIG)


def test_a_rank_that_is_not_that_of_the_factors(adapter: Path, base: Path) -> None:
    change_config(adapter, r=8)
    error = refusal(adapter, base)
    assert error.what == "the factors have rank 4, adapter_config.json says 8"
    assert error.file == str(adapter / WEIGHTS)
    assert error.tensor is not None and error.tensor.endswith(".lora_A.weight")


def test_factors_of_different_ranks(adapter: Path, base: Path) -> None:
    change_weights(adapter, **{f"base_model.model.{QUERY}.lora_B.weight": torch.zeros(32, 3)})
    error = refusal(adapter, base)
    assert "factor A has rank 4, B has" in error.what
    assert error.file == str(adapter / WEIGHTS)
    assert error.tensor == f"base_model.model.{QUERY}.lora_A.weight"


@pytest.mark.parametrize("lost, left", [("A", "B"), ("B", "A")])
def test_one_factor_missing(adapter: Path, base: Path, lost: str, left: str) -> None:
    change_weights(adapter, **{f"base_model.model.{QUERY}.lora_{lost}.weight": None})
    error = refusal(adapter, base)
    assert error.what == "one factor of the pair is missing"
    assert error.file == str(adapter / WEIGHTS)
    assert error.tensor == f"base_model.model.{QUERY}.lora_{left}.weight"


def test_a_part_of_lora_that_is_not_known(adapter: Path, base: Path) -> None:
    name = f"base_model.model.{QUERY}.lora_C.weight"
    change_weights(adapter, **{name: torch.zeros(4, 4)})
    error = refusal(adapter, base)
    assert error.what == "a part of LoRA that is not known"
    assert (error.file, error.tensor) == (str(adapter / WEIGHTS), name)


def test_an_adapter_without_weights(adapter: Path, base: Path) -> None:
    (adapter / WEIGHTS).unlink()
    error = refusal(adapter, base)
    assert error.what == "the adapter has no adapter_model.safetensors"
    assert error.file == str(adapter)


def test_an_adapter_without_factors(adapter: Path, base: Path) -> None:
    save_file({}, adapter / WEIGHTS)
    error = refusal(adapter, base)
    assert error.what == "the adapter holds no LoRA factors"
    assert error.file == str(adapter / WEIGHTS)


def test_a_base_of_another_width(adapter: Path, tmp_path: Path) -> None:
    wide = save_base(lambda: llama(hidden_size=48), tmp_path / "wide")
    error = refusal(adapter, wide)
    assert "the adapter is for a tensor of shape" in error.what
    assert "its base has" in error.what
    assert error.file == str(adapter / WEIGHTS)
    assert error.remedy is not None and "--base" in error.remedy


def test_a_base_with_fewer_layers(adapter: Path, tmp_path: Path) -> None:
    shallow = save_base(lambda: llama(num_hidden_layers=1), tmp_path / "shallow")
    error = refusal(adapter, shallow)
    assert "model.layers.1." in error.what
    assert "lacks" in error.what
    assert error.file == str(adapter / WEIGHTS)
    assert error.remedy is not None and "--base" in error.remedy


@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["embed_tokens"]}, {"target_modules": ["q_proj"], "modules_to_save": [HEAD.split(".")[0]]}],
    ids=["factors", "whole"],
)
def test_a_base_of_another_vocabulary(base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    larger = save_base(lambda: llama(vocab_size=70), tmp_path / "larger")
    make_adapter(larger, tmp_path / "adapter", LoraConfig(**options))
    error = refusal(tmp_path / "adapter", base)
    assert "70" in error.what and "60" in error.what
    assert error.tensor in {EMBEDDING, HEAD}
    assert error.remedy is not None and "another vocabulary" in error.remedy


@pytest.mark.filterwarnings("ignore:.*the embedding layer has been resized:UserWarning")
def test_a_vocabulary_that_was_resized_in_training(base: Path, tmp_path: Path) -> None:
    model = load(base)
    model.resize_token_embeddings(70, mean_resizing=False)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    error = refusal(tmp_path / "adapter", base)
    assert "[70, 32]" in error.what and "[60, 32]" in error.what
    assert error.file == str(tmp_path / "adapter" / WEIGHTS)
    assert error.tensor in {EMBEDDING, HEAD}
    assert error.remedy is not None and "another vocabulary" in error.remedy


# Merging --------------------------------------------------------------------------------------------------------------

# Updates of about a tenth of the weights, as fine-tuning makes them: larger ones would hide what rounding does to the
# small directions of a dense task vector.
STD = 0.02
TRAINING: dict[str, dict[str, Any]] = {
    "a": {"r": 4, "lora_alpha": 12},
    "b": {"r": 2, "lora_alpha": 6, "use_rslora": True},
    "c": {"r": 3, "lora_alpha": 9, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"up_proj": 4}},
}
TOKENS = torch.arange(20)[None]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base, adapters `a`, `b` and `c` of it, and their merge `abc`."""
    home = tmp_path_factory.mktemp("home")
    base = save_base(llama, home / "base")
    for seed, (name, options) in enumerate(TRAINING.items(), start=1):
        config = LoraConfig(target_modules="all-linear", **options)
        make_adapter(base, home / name, config, seed=seed, std=STD)
    basiscli.merge([home / name for name in TRAINING], method="ortho", base=base, output=home / "abc")
    return home


def task_vector(model: Path, base: Path) -> Tensors:
    origin = read_checkpoint(base)
    return {name: tensor.double() - origin[name].double() for name, tensor in read_checkpoint(model).items()}


def assert_same_task_vector(found: Path, expected: Path, base: Path) -> None:
    """Check that no tensor's task vector is off by more than 1e-5 of its length: two roundings of float32 weights."""
    ours, theirs = task_vector(found, base), task_vector(expected, base)
    for name, vector in theirs.items():
        distance, length = (ours[name] - vector).norm(), vector.norm()
        assert distance <= 1e-5 * length, f"{name}: off by {distance / length:.1e} of its length"


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model.eval()(TOKENS).logits


def assert_same_logits(adapter: Path, merged: Path, base: Path) -> None:
    """Check that an adapter does to the base what a merged checkpoint says, to 1e-5 of what it does."""
    found, expected = logits(PeftModel.from_pretrained(load(base), adapter)), logits(load(merged))
    assert (found - expected).norm() <= 1e-5 * (expected - logits(load(base))).norm()


def test_in_factors_a_merge_equals_that_of_the_dense_checkpoints(home: Path, tmp_path: Path) -> None:
    # In float64: the rounding of float32 weights would give a dense task vector directions of its own, to be closed
    # to the next model like any other. What is left is the rounding of the two results.
    for name in TRAINING:
        model = PeftModel.from_pretrained(load(home / "base").double(), home / name).double()
        model.merge_and_unload().save_pretrained(tmp_path / name)
    dense = [tmp_path / name for name in TRAINING]
    result = basiscli.merge(dense, method="ortho", base=home / "base", output=tmp_path / "out")
    assert_same_task_vector(home / "abc", result.path, home / "base")


def test_a_linear_merge_of_adapters_is_the_mean_of_the_models(home: Path, tmp_path: Path) -> None:
    models = [PeftModel.from_pretrained(load(home / "base"), home / name) for name in TRAINING]
    states = [model.merge_and_unload().state_dict() for model in models]
    folders = [home / name for name in TRAINING]
    result = basiscli.merge(folders, method="linear", base=home / "base", output=tmp_path / "out")
    for name, tensor in read_checkpoint(result.path).items():
        assert_same(tensor, sum(state[name] for state in states) / 3, name)


def merge_as_adapter(home: Path, names: str, out: Path, **options: Any) -> Path:
    models = [home / name for name in names]
    return basiscli.merge(models, method="ortho", base=home / "base", as_adapter=True, output=out, **options).path


def test_as_an_adapter_it_loads_with_peft_and_gives_the_same_logits(home: Path, tmp_path: Path) -> None:
    out = merge_as_adapter(home, "abc", tmp_path / "out")
    assert_same_logits(out, home / "abc", home / "base")


def test_as_an_adapter_it_has_one_rank_and_no_patterns(home: Path, tmp_path: Path) -> None:
    out = merge_as_adapter(home, "abc", tmp_path / "out")
    config = json.loads((out / CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] == 4 + 2 + 5
    assert not (config["rank_pattern"] or config["alpha_pattern"] or config["use_rslora"])
    ranks = {min(tensor.shape) for tensor in load_file(out / WEIGHTS).values()}
    assert ranks == {11}


@pytest.mark.parametrize(
    "first, second",
    [
        ({"target_modules": ["q_proj"]}, {"target_modules": ["down_proj"]}),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0]}, {"target_modules": r".*\.1\..*down_proj"}),
    ],
    ids=["modules", "layers"],
)
def test_as_an_adapter_it_has_the_modules_of_all(
    home: Path, tmp_path: Path, first: dict[str, Any], second: dict[str, Any]
) -> None:
    for seed, options in enumerate([first, second]):
        make_adapter(home / "base", tmp_path / str(seed), LoraConfig(r=4, **options), seed=seed)
    options = {"method": "ortho", "base": home / "base"}
    whole = basiscli.merge([tmp_path / "0", tmp_path / "1"], output=tmp_path / "whole", **options)
    adapter = basiscli.merge([tmp_path / "0", tmp_path / "1"], output=tmp_path / "out", as_adapter=True, **options)
    assert_same_logits(adapter.path, whole.path, home / "base")


def test_an_adapter_of_conv1d_loads_with_peft(tmp_path: Path) -> None:
    base = save_base(gpt2, tmp_path / "base")
    for seed, name in enumerate("ab"):
        config = LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
        make_adapter(base, tmp_path / name, config, seed=seed)
    out = merge_as_adapter(tmp_path, "ab", tmp_path / "adapter")
    basiscli.merge([tmp_path / "a", tmp_path / "b"], method="ortho", base=base, output=tmp_path / "whole")
    assert_same_logits(out, tmp_path / "whole", base)


def test_onto_continues_a_full_checkpoint(home: Path, tmp_path: Path) -> None:
    options = {"method": "ortho", "base": home / "base"}
    basiscli.merge([home / "a", home / "b"], output=tmp_path / "ab", **options)
    result = basiscli.merge([home / "c"], onto=tmp_path / "ab", output=tmp_path / "ab+c", **options)
    assert result.report.numbers["models"] == 3
    assert_same_task_vector(result.path, home / "abc", home / "base")


def test_onto_continues_an_adapter(home: Path, tmp_path: Path) -> None:
    merge_as_adapter(home, "ab", tmp_path / "ab")
    out = merge_as_adapter(home, "c", tmp_path / "ab+c", onto=tmp_path / "ab")
    assert_same_logits(out, home / "abc", home / "base")
    full = basiscli.merge(
        [home / "c"], method="ortho", base=home / "base", onto=tmp_path / "ab", output=tmp_path / "full"
    )
    assert_same_task_vector(full.path, home / "abc", home / "base")


@pytest.mark.parametrize(
    "options", [{"bias": "all"}, {"modules_to_save": ["norm"]}, {"target_modules": ["embed_tokens"]}], ids=str
)
def test_what_no_lora_can_hold_is_not_written_as_an_adapter(tmp_path: Path, options: dict[str, Any]) -> None:
    base = save_base(lambda: llama(attention_bias=True), tmp_path / "base")
    make_adapter(base, tmp_path / "a", LoraConfig(**{"target_modules": ["q_proj"]} | options))
    with pytest.raises(InputError) as caught:
        merge_as_adapter(tmp_path, "a", tmp_path / "out")
    assert caught.value.what == "the adapter trains something that no LoRA of linear layers can hold"
    assert caught.value.file == str(tmp_path / "a")
    assert not (tmp_path / "out").exists()


def test_a_merge_of_adapters_never_holds_a_dense_tensor(tmp_path: Path) -> None:
    module, peaks = "model.layers.0.mlp.up_proj", {}
    for side in (64, 4096):
        folder = tmp_path / str(side)
        write_checkpoint(folder / "base", {f"{module}.weight": torch.zeros(side, side)})
        for name in "ab":
            factors = {"A": torch.randn(2, side), "B": torch.randn(side, 2)}
            (folder / name).mkdir()
            save_file(
                {f"base_model.model.{module}.lora_{k}.weight": t for k, t in factors.items()}, folder / name / WEIGHTS
            )
            (folder / name / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
        words = [folder / "a", folder / "b", "--base", folder / "base", "-m", "ortho", "-o", folder / "out", "--json"]
        peaks[side] = json.loads(basis_process("merge", *words).stdout)["cost"]["peak_memory_bytes"]
    assert peaks[4096] - peaks[64] < 4 * 4096 * 4096


# The base -------------------------------------------------------------------------------------------------------------


def copy_adapter(home: Path, name: str, place: Path, **options: Any) -> Path:
    place.mkdir(parents=True)
    for file in (WEIGHTS, CONFIG):
        (place / file).write_bytes((home / name / file).read_bytes())
    change_config(place, **options)
    return place


def test_the_base_is_the_one_that_the_adapters_name(home: Path, tmp_path: Path) -> None:
    result = basiscli.merge([home / name for name in TRAINING], method="ortho", output=tmp_path / "out")
    expected = json.loads((home / "abc" / "basis_report.json").read_text())
    assert result.report.weights_digest == expected["weights_digest"]
    assert [s.spec for s in result.report.sources if s.role == "base"] == [str(home / "base")]


def test_a_relative_path_to_the_base_counts_from_the_adapters_folder(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "base").symlink_to(home / "base")
    models = [
        copy_adapter(home, name, tmp_path / "models" / name, base_model_name_or_path="../base") for name in TRAINING
    ]
    monkeypatch.chdir(tmp_path)
    result = basiscli.merge(models, method="ortho", output=tmp_path / "out")
    expected = json.loads((home / "abc" / "basis_report.json").read_text())
    assert result.report.weights_digest == expected["weights_digest"]


def test_adapters_that_name_different_bases(home: Path, tmp_path: Path) -> None:
    other = copy_adapter(home, "b", tmp_path / "b", base_model_name_or_path="org/other")
    with pytest.raises(UsageError) as caught:
        basiscli.merge([home / "a", other], method="ortho", output=tmp_path / "out")
    assert f"{home / 'a'}: {home / 'base'}" in caught.value.what
    assert f"{other}: org/other" in caught.value.what
    assert caught.value.remedy is not None and "--base" in caught.value.remedy


def test_an_adapter_that_names_no_base(home: Path, tmp_path: Path) -> None:
    silent = copy_adapter(home, "b", tmp_path / "b", base_model_name_or_path=None)
    with pytest.raises(UsageError) as caught:
        basiscli.merge([home / "a", silent], method="ortho", output=tmp_path / "out")
    assert f"{silent} does not name one" in caught.value.what
    assert caught.value.remedy is not None and "--base" in caught.value.remedy


def test_a_named_base_that_is_gone(home: Path, tmp_path: Path) -> None:
    orphan = copy_adapter(home, "a", tmp_path / "a", base_model_name_or_path="/gone/base")
    with pytest.raises(InputError) as caught:
        basiscli.merge([orphan], method="ortho", output=tmp_path / "out")
    assert "names '/gone/base' as its base" in caught.value.what
    assert caught.value.file == str(orphan)
    assert caught.value.remedy is not None and "--base" in caught.value.remedy


def test_a_base_that_the_hub_does_not_give_can_be_said(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(HubError, match="adapter names org/base as its base") as caught:
        resolve_base("org/base", resolve(str(tmp_path / "adapter")))
    assert "--base" in (caught.value.remedy or "")
