"""NOLA layers against dense algebra, and as PEFT users meet them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from basiscli import NolaConfig
from basiscli.checkpoints.packing import packed
from basiscli.linalg.nola import factor_bases
from basiscli.linalg.randbasis import RandomBases
from basiscli.runtime.nola import NolaLayer, combination
from tests.init_models import IDS, answer, gpt2, llama, off, quiet_peft

# transformers 5.23 renamed it.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    if hasattr(transformers.PreTrainedModel, name)
)
pytestmark = [quiet_peft, pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")]


def config(**options: Any) -> NolaConfig:
    return NolaConfig(**{"r": 4, "num_bases": 24, "nola_alpha": 6, "target_modules": "all-linear"} | options)


def adapted(base: nn.Module, **options: Any) -> Any:
    return get_peft_model(base, config(**options))


def layers(model: nn.Module) -> dict[str, NolaLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, NolaLayer)}


def dense(bases: RandomBases) -> Tensor:
    """Return all bases [k, rows, columns] in float64."""
    return bases.rows(slice(None)).double().view(-1, *bases.shape) * bases.bound


def train(model: Any, steps: int = 8) -> None:
    model.train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.eval()


@pytest.fixture(autouse=True)
def _same_weights() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.enable_grad():
        yield


@pytest.mark.parametrize("rslora", [False, True])
def test_forward_and_gradients_are_those_of_dense_float64(rslora: bool) -> None:
    options: dict[str, Any] = {"num_bases": 30, "seed": 5, "init_weights": False, "use_rslora": rslora}
    wrapped = adapted(nn.Sequential(nn.Linear(20, 12)), **options, target_modules=["0"])
    layer = wrapped.base_model.model[0]
    x, direction = torch.randn(7, 20), torch.randn(7, 12)
    (wrapped(x) * direction).sum().backward()

    bases_a, bases_b = factor_bases(5, "0", rank=4, count=30, in_features=20, out_features=12)
    a, b = (layer.nola_a["default"].double().detach(), layer.nola_b["default"].double().detach())
    a, b = a.requires_grad_(), b.requires_grad_()
    big_a, big_b = torch.einsum("k,kij->ij", a, dense(bases_a)), torch.einsum("k,kij->ij", b, dense(bases_b))
    delta = 6 / (2 if rslora else 4) * big_b @ big_a
    expected = x.double() @ (layer.base_layer.weight.double() + delta).T + layer.base_layer.bias.double()
    (expected * direction.double()).sum().backward()
    torch.testing.assert_close(wrapped(x).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.get_delta_weight("default").double(), delta, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.nola_a["default"].grad.double(), a.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.nola_b["default"].grad.double(), b.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_training_begins_where_the_model_stands_and_changes_it(make: Any) -> None:
    base = make().eval()
    expected = answer(base)
    model = adapted(base).eval()
    assert torch.equal(answer(model), expected)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(name.endswith(("nola_a.default", "nola_b.default")) for name in trained)
    train(model)
    assert off(answer(model), expected) > 1e-2


@pytest.mark.parametrize("make", [llama, gpt2])
def test_what_is_saved_is_seed_and_coefficients_and_loads(make: Any, tmp_path: Path) -> None:
    base = make().eval()
    fresh = copy.deepcopy(base)
    model = adapted(base, seed=77)
    train(model)
    expected = answer(model)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert len(stored) == 2 * len(layers(model))
    assert all(key.endswith((".nola_a", ".nola_b")) and tensor.shape == (24,) for key, tensor in stored.items())
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["seed"], saved["num_bases"]) == ("NOLA", 77, 24)
    loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert torch.equal(answer(loaded), expected)
    again = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(again, NolaConfig)
    assert again.peft_type is PeftType.NOLA


@pytest.mark.parametrize(("bits", "most"), [(16, 1e-3), (8, 2e-2), (4, 0.4)])
def test_coefficients_stored_in_few_bits_load(bits: int, most: float, tmp_path: Path) -> None:
    base = llama().eval()
    fresh, plain = copy.deepcopy(base), answer(base)
    model = adapted(base)
    train(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    small = {key: t.half() if bits == 16 else packed(t, bits) for key, t in load_file(file).items()}
    save_file(small, file)
    loaded = PeftModel.from_pretrained(fresh, tmp_path, adapter_name="other").eval()
    assert all(p.dtype == torch.float32 for n, p in loaded.named_parameters() if "nola_" in n)
    assert 0 < off(answer(loaded) - plain, answer(model) - plain) < most


def test_bases_belong_to_a_module_and_not_to_its_place() -> None:
    whole = adapted(llama(), target_modules=["q_proj", "down_proj"], init_weights=False)
    one = adapted(llama(), target_modules=["down_proj"], init_weights=False)
    headless = adapted(llama().model, target_modules=["down_proj"], init_weights=False)
    pairs = [layers(m)[f"base_model.model.{p}layers.1.mlp.down_proj"] for m, p in
             ((whole, "model."), (one, "model."), (headless, ""))]  # fmt: skip
    deltas = [pair.get_delta_weight("default").detach() for pair in pairs]
    assert torch.equal(deltas[0], deltas[1])
    assert torch.equal(deltas[0], deltas[2])
    others = [layer.get_delta_weight("default").detach() for layer in layers(one).values()]
    assert off(*others) > 0.5
    seeded = list(layers(adapted(llama(), target_modules=["down_proj"], init_weights=False, seed=1)).values())
    assert off(seeded[1].get_delta_weight("default").detach(), deltas[0]) > 0.5


def test_merged_unmerged_disabled_and_unloaded() -> None:
    base = llama().eval()
    plain, weights = answer(base), copy.deepcopy(base.state_dict())
    model = adapted(base)
    train(model)
    expected = answer(model)
    with model.disable_adapter():
        assert torch.equal(answer(model), plain)
    model.merge_adapter(safe_merge=True)
    assert off(answer(model), expected) < 1e-6
    with model.disable_adapter():  # as PEFT does: takes the update out first
        assert off(answer(model), plain) < 1e-6
    model.merge_adapter()
    model.unmerge_adapter()
    assert off(answer(model), expected) < 1e-6
    for name, tensor in model.get_base_model().state_dict().items():
        if (own := weights.get(name.replace(".base_layer", ""))) is not None:
            torch.testing.assert_close(tensor, own, rtol=0, atol=1e-7)
    alone = model.merge_and_unload()
    assert not layers(alone)
    assert off(answer(alone), expected) < 1e-6


def test_several_adapters_are_switched_added_and_deleted() -> None:
    base = llama().eval()
    plain = answer(base)
    model = adapted(base, init_weights=False).eval()
    first = answer(model)
    other = config(r=2, num_bases=7, seed=4, target_modules=["q_proj", "up_proj"], init_weights=False)
    model.add_adapter("other", other)
    assert torch.equal(answer(model), first)
    model.set_adapter("other")
    second = answer(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if n.endswith(("nola_a.other", "nola_b.other"))
    }
    assert off(second, first) > 1e-3 < off(second, plain)
    model.base_model.set_adapter(["default", "other"])
    both = answer(model)
    assert off(both, first) > 1e-3 < off(both, second)
    model.base_model.merge_adapter(["default", "other"])
    assert off(answer(model), both) < 1e-6
    model.base_model.unmerge_adapter()
    model.set_adapter("default")
    model.delete_adapter("other")
    assert off(answer(model), first) < 1e-6


def test_a_change_of_the_coefficients_shows_at_once() -> None:
    model = adapted(llama(), init_weights=False).eval()
    before = answer(model)
    assert torch.equal(answer(model), before)  # from factors that were kept
    with torch.no_grad():
        for layer in layers(model).values():
            layer.nola_b["default"].mul_(2)
    doubled = answer(model)
    for layer in layers(model).values():
        layer.nola_b["default"].data = layer.nola_b["default"].data / 2
    assert off(doubled, before) > 1e-3
    assert torch.equal(answer(model), before)


def test_factors_made_in_inference_mode_serve_gradients_of_the_inputs(tmp_path: Path) -> None:
    adapted(llama(), init_weights=False).save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(llama(), tmp_path).eval()
    with torch.inference_mode():
        expected = frozen(input_ids=IDS).logits
    embedded = frozen.get_input_embeddings()(IDS).detach().requires_grad_()
    logits = frozen(inputs_embeds=embedded).logits
    logits.sum().backward()
    torch.testing.assert_close(logits.detach(), expected.clone())
    assert embedded.grad.abs().sum() > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = adapted(llama(), init_weights=False).train()
        if checkpointing:
            getattr(model, CHECKPOINTING)({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append([p.grad for n, p in model.named_parameters() if "nola_" in n])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(autocast: bool) -> None:
    exact = adapted(llama(), init_weights=False).eval()
    base = llama()
    base.load_state_dict({k.replace(".base_layer", ""): v for k, v in exact.get_base_model().state_dict().items()
                          if "nola_" not in k})  # fmt: skip
    model = adapted(base if autocast else base.bfloat16(), init_weights=False).eval()
    assert {p.dtype for n, p in model.named_parameters() if "nola_" in n} == {torch.float32}
    expected = answer(exact)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=IDS, labels=IDS).loss
        assert 0 < off(answer(model), expected) < 3e-2
    loss.backward()
    exact(input_ids=IDS, labels=IDS).loss.backward()
    for one, other in zip(layers(model).values(), layers(exact).values(), strict=True):
        assert off(one.nola_b["default"].grad, other.nola_b["default"].grad) < 0.15
    model.merge_adapter()
    assert off(answer(model), answer(exact)) < 3e-2


def peak_of(count: int, materialised: bool) -> int:
    """Return the most bytes that a forward and a backward of a layer of 256 × 256 hold at a time."""
    bases = RandomBases(1, count, (8, 256), 0.1)
    coefficients, x = torch.ones(count, requires_grad=True), torch.ones(4, 256)

    def step() -> None:
        whole = bases.rows(slice(None)).view(count, 8, 256) if materialised else None
        a = combination(coefficients, bases) if whole is None else torch.einsum("k,kij->ij", coefficients, whole)
        (x @ a.T).square().sum().backward()

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def test_memory_does_not_grow_with_the_number_of_bases() -> None:
    few, *flat = [peak_of(count, materialised=False) for count in (64, 256, 1024, 4096)]
    whole = 4096 * 8 * 256 * 4
    # 64 bases are less than a block; from there on it is the coefficients alone that grow.
    assert few <= min(flat)
    assert max(flat) - min(flat) < 4096 * 4 * 4
    assert peak_of(4096, materialised=True) > whole > 10 * max(flat)


def test_trainer(tmp_path: Path) -> None:
    model = adapted(llama(), task_type="CAUSAL_LM")
    getattr(model, CHECKPOINTING)()
    model.enable_input_require_grads()
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 8
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=6, per_device_train_batch_size=2, learning_rate=5e-2, report_to=[], use_cpu=True,
        save_steps=6, logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.05
    saved = load_file(tmp_path / "checkpoint-6" / "adapter_model.safetensors")
    assert sum(t.numel() for t in saved.values()) == model.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize(
    ("options", "word"),
    [({"r": 0}, "`r` is 0"), ({"num_bases": 0}, "`num_bases` is 0"), ({"nola_dropout": 1.0}, "nola_dropout"),
     ({"layers_pattern": "layers"}, "layers_to_transform")],
)  # fmt: skip
def test_bad_configurations_are_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        config(**options)


def test_modules_that_are_not_linear_or_of_other_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="embed_tokens is a Embedding"):
        adapted(llama(), target_modules=["embed_tokens"])
    adapted(llama()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"made for \[32, 48\]"):
        PeftModel.from_pretrained(llama(intermediate_size=64), tmp_path)
