"""`basis compress ADAPTER --method nola`: what it finds against dense algebra, what it says against stock PEFT."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import Result

import basiscli
from basiscli.calibration.tokens import read_windows
from basiscli.checkpoints.packing import packed, rounding_variance, unpacked
from basiscli.linalg.lowrank import LowRank
from basiscli.linalg.nola import factor_bases
from basiscli.linalg.nola_fit import explained_share, fit
from tests import kv_models
from tests.conftest import snapshot
from tests.init_models import load, quiet_peft

pytestmark = [quiet_peft, pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")]
Basis = Callable[..., Result]
LENGTH = 32


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def setting(tmp_path: Path) -> dict[str, Path]:
    """Return a tiny model, a text, and a LoRA of the model trained on the text."""
    torch.manual_seed(0)
    model = kv_models.llama(tie_word_embeddings=False)
    kv_models.save_model(tmp_path / "model", model)
    (tmp_path / "text.txt").write_text(kv_models.make_text(2000))
    tuned = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, lora_alpha=6, target_modules="all-linear"))
    tuned.peft_config["default"].base_model_name_or_path = str(tmp_path / "model")
    windows = read_windows(tmp_path / "text.txt", kv_models.byte_tokenizer, LENGTH, kv_models.VOCABULARY)
    optimiser = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=0.02)
    for step in range(25):
        part = windows.ids[step % len(windows) :][:4]
        tuned(input_ids=part, labels=part).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    tuned.save_pretrained(tmp_path / "lora")
    return {
        "model": tmp_path / "model",
        "text": tmp_path / "text.txt",
        "lora": tmp_path / "lora",
        "out": tmp_path / "out",
    }


def compress(setting: dict[str, Path], **options: Any) -> basiscli.CompressResult:
    given: dict[str, Any] = {"bases": 40, "calibration": setting["text"], "length": LENGTH, "steps": 0, "force": True}
    return basiscli.compress_adapter(setting["lora"], **{"output": setting["out"]} | given | options)


def words(setting: dict[str, Path], *more: str | Path) -> list[str | Path]:
    own: list[str | Path] = ["compress", setting["lora"], "--method", "nola", "--calibration", setting["text"]]
    return [*own, "--length", str(LENGTH), "--steps", "0", "-o", setting["out"], *more]


# The fit of one module ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_the_share_is_that_of_the_dense_product(weighted: bool) -> None:
    target = LowRank(normal(14, 3, seed=1), normal(3, 10, seed=2), (14, 10))
    x = normal(200, 10, seed=3) * torch.linspace(0.05, 3, 10)
    metric = (x.mT @ x / 200) if weighted else None
    bases = factor_bases(0, "q", rank=2, count=9, in_features=10, out_features=14)
    found = fit(target, *bases, 1.5, metric)
    a, b = (one.combination(c).double() for one, c in zip(bases, (found.a, found.b), strict=True))
    dense = target.b.double() @ target.a.double()
    root = torch.linalg.cholesky(metric.double()) if metric is not None else torch.eye(10, dtype=torch.float64)
    share = 1 - ((1.5 * b @ a - dense) @ root).square().sum() / (dense @ root).square().sum()
    assert found.share == pytest.approx(float(share), abs=1e-5)
    assert 0 < found.share < 1
    # Neither factor's coefficients can be bettered: a step either way along any direction adds error.
    for place, step in ((0, found.a), (1, found.b)):
        for size in (-0.05, 0.05):
            moved = [found.a, found.b]
            moved[place] = step + size * step.norm() * torch.nn.functional.normalize(normal(len(step), seed=7), dim=0)
            a, b = (one.combination(c).double() for one, c in zip(bases, moved, strict=True))
            worse = 1 - ((1.5 * b @ a - dense) @ root).square().sum() / (dense @ root).square().sum()
            assert worse < share


def test_bases_that_span_the_factors_find_the_best_approximation_of_their_rank() -> None:
    target = LowRank(normal(12, 3, seed=1), normal(3, 8, seed=2), (12, 8))
    sigma = target.svd()[1]
    for rank in (1, 2, 3):
        bases = factor_bases(0, "q", rank=rank, count=1000, in_features=8, out_features=12)
        assert fit(target, *bases, 1.0, None).share == pytest.approx(
            float((sigma[:rank] ** 2).sum() / (sigma**2).sum()), abs=5e-3
        )


@pytest.mark.parametrize(("bits", "least"), [(8, 0.97), (4, 0.4)])
def test_coefficients_are_fitted_for_the_rounding_that_awaits_them(bits: int, least: float) -> None:
    target = LowRank(normal(200, 1, seed=1), normal(1, 200, seed=2), (200, 200))
    bases = factor_bases(0, "q", rank=1, count=200, in_features=200, out_features=200)
    shares = []
    for noise in (1e-6, rounding_variance(bits)):
        found = fit(target, *bases, 1.0, None, noise=noise)
        a, b = (
            one.combination(unpacked(packed(c, bits), 200)) for one, c in zip(bases, (found.a, found.b), strict=True)
        )
        shares.append(explained_share(target, LowRank(b, a, target.shape), None)[0])
    assert shares[1] > max(least, shares[0])


def test_inputs_in_few_directions_need_few_bases() -> None:
    target = LowRank(normal(20, 1, seed=1), normal(1, 60, seed=2), (20, 60))
    x = normal(500, 4, seed=3) @ normal(4, 60, seed=4) + 0.01 * normal(500, 60, seed=5)
    bases = factor_bases(0, "q", rank=1, count=20, in_features=60, out_features=20)
    assert fit(target, *bases, 1.0, None).share < 0.6
    assert fit(target, *bases, 1.0, x.mT @ x).share > 0.95


def test_an_update_of_zero_needs_nothing() -> None:
    bases = factor_bases(0, "q", rank=1, count=5, in_features=6, out_features=7)
    found = fit(LowRank(torch.zeros(7, 2), normal(2, 6), (7, 6)), *bases, 1.0, None)
    assert found.share == 1
    assert not found.b.any()


# The whole ------------------------------------------------------------------------------------------------------------


def independent_kl(setting: dict[str, Path], result: Path) -> tuple[float, float]:
    """Return KL(LoRA ‖ result) and KL(LoRA ‖ base) over every eighth window, from models that PEFT loads."""
    windows = read_windows(setting["text"], kv_models.byte_tokenizer, LENGTH, kv_models.VOCABULARY)
    held = min(8, max(1, len(windows) // 8))
    ids = windows.ids[[place * (len(windows) // held) for place in range(held)]]
    logs = []
    for adapter in (setting["lora"], result, None):
        model = load(setting["model"])
        model = model if adapter is None else PeftModel.from_pretrained(model, adapter).eval()
        with torch.no_grad():
            logs.append(model(input_ids=ids).logits[:, :-1].double().log_softmax(-1))
    lora, nola, base = logs
    return tuple(float((lora.exp() * (lora - other)).sum(-1).mean()) for other in (nola, base))  # type: ignore[return-value]


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("steps", [0, 10])
def test_the_report_says_what_peft_measures(setting: dict[str, Path], bits: int, steps: int) -> None:
    before = snapshot(setting["model"], setting["lora"])
    done = compress(setting, bits=bits, steps=steps)
    numbers = done.report.numbers
    kl, kl_base = independent_kl(setting, done.path)
    assert numbers["kl"] == pytest.approx(kl, rel=1e-3)
    assert numbers["kl_base"] == pytest.approx(kl_base, rel=1e-3)
    assert numbers["fidelity"] == pytest.approx(1 - kl / kl_base, abs=1e-3)
    assert snapshot(setting["model"], setting["lora"]) == before
    stored = load_file(done.path / "adapter_model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float16 if bits == 16 else torch.uint8}
    sizes = [(folder / "adapter_model.safetensors").stat().st_size for folder in (done.path, setting["lora"])]
    assert numbers["bytes_kept"] == sizes[0] / sizes[1]
    assert done.report.cost.written_bytes == sizes[0]
    plain = basiscli.expand(done.path, output=setting["out"].parent / "plain")
    assert independent_kl(setting, plain.path)[0] == pytest.approx(kl, rel=1e-3)
    assert basiscli.verify(done.path).checked_digests


def test_training_on_the_logits_betters_what_the_layers_gave(setting: dict[str, Path]) -> None:
    numbers = compress(setting, bases=24, steps=40, batch=4).report.numbers
    assert numbers["fidelity"] > numbers["fidelity_layers"] + 0.02
    assert numbers["perplexity_lora"] < numbers["perplexity"] < numbers["perplexity_base"]
    assert numbers["perplexity_base"] < math.inf


def test_the_same_command_gives_the_same_bytes(setting: dict[str, Path]) -> None:
    results = [compress(setting, steps=3, output=setting["out"].parent / name) for name in ("one", "two")]
    one, two = (snapshot(r.path) for r in results)
    for (name, content), other in zip(one.items(), two.values(), strict=True):
        assert content == other or name.endswith(("basis_report.json", "README.md"))


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_without_a_base_the_matrices_are_matched(setting: dict[str, Path], bits: int) -> None:
    done = compress(setting, weights_only=True, calibration=None, bases=90, rank=2, bits=bits)
    plain = basiscli.expand(done.path, output=setting["out"].parent / "plain")
    error = whole = 0.0
    found, wanted = (load_file(folder / "adapter_model.safetensors") for folder in (plain.path, setting["lora"]))
    for key in (key for key in wanted if "lora_A" in key):
        pair = [
            (6 / 2 if t is wanted else 1) * t[key.replace("lora_A", "lora_B")].double() @ t[key].double()
            for t in (found, wanted)
        ]
        error += float((pair[0] - pair[1]).square().sum())
        whole += float(pair[1].square().sum())
    assert done.report.numbers["fidelity"] == pytest.approx(1 - error / whole, abs=1e-5)
    assert any("without a base" in note for note in done.report.notes)


def test_a_floor_that_is_not_met_leaves_nothing(setting: dict[str, Path], basis: Basis) -> None:
    found = basis(*words(setting, "--bases", "2", "--min-fidelity", "0.99"))
    assert found.exit_code == 4, found.output
    assert "of the adapter's effect survives" in found.output.replace("\n", " ")
    assert not list(setting["out"].parent.glob("out*"))
    forced = basis(*words(setting, "--bases", "2", "--min-fidelity", "0.99", "--force", "--json"))
    assert forced.exit_code == 0, forced.output
    assert json.loads(forced.stdout)["numbers"]["fidelity"] < 0.99
    assert (setting["out"] / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("more", "code", "word"),
    [
        ((), 2, "number of bases"),
        (("--bases", "0"), 2, "bases 0"),
        (("--bases", "8", "--bits", "5"), 2, "5 bits"),
        (("--bases", "8", "--rank", "0"), 2, "rank 0"),
        (("--bases", "8", "--min-fidelity", "2"), 2, "min_fidelity 2"),
        (("--bases", "8", "--learning-rate", "0"), 2, "learning rate"),
        (("--bases", "8", "--weights-only"), 2, "--weights-only takes no base"),
        (("--bases", "8", "--calibration", "absent.txt"), 3, "no such calibration file"),
        (("--bases", "8", "--base", "absent"), 3, "no such model"),
        (("--bases", "8", "--length", "1900"), 3, "calibration text"),
    ],
)
def test_bad_options(setting: dict[str, Path], basis: Basis, more: tuple[str, ...], code: int, word: str) -> None:
    found = basis(*words(setting, *more))
    assert found.exit_code == code, found.output
    assert word in found.output.replace("\n", " ")
    assert not list(setting["out"].parent.glob("out*"))


def test_bad_adapters(setting: dict[str, Path], basis: Basis, tmp_path: Path) -> None:
    def refused(word: str, folder: Path = setting["lora"]) -> None:
        found = basis("compress", folder, "--method", "nola", "--bases", "8", "--length", "32", "-o", setting["out"])
        assert found.exit_code == 3, found.output
        assert word in found.output.replace("\n", " ")
        assert not list(setting["out"].parent.glob("out*"))

    refused("not an adapter", setting["model"])
    made = basiscli.init(setting["model"], method="nola", rank=2, parameters={"bases": 4}, output=tmp_path / "nola")
    refused("NOLA adapter already", made.adapter)
    other = kv_models.save_model(tmp_path / "other", kv_models.llama(hidden_size=64))
    file, table = setting["lora"] / "adapter_model.safetensors", setting["lora"] / "adapter_config.json"
    config, stored = json.loads(table.read_text()), load_file(file)
    table.write_text(json.dumps(config | {"base_model_name_or_path": str(other)}))
    refused("another model")
    table.write_text(json.dumps(config | {"use_dora": True}))
    refused("use_dora")
    table.write_text(json.dumps(config))
    first = next(iter(stored))
    save_file(stored | {first: stored[first] / 0}, file)
    refused("NaN or Inf")
    save_file(stored | {"base_model.model.model.norm.weight": torch.ones(32)}, file)
    refused("more than factors")


def test_dry_run_and_a_rank_that_the_bases_span(setting: dict[str, Path], basis: Basis) -> None:
    found = basis(*words(setting, "--bases", "100", "--dry-run", "--json"))
    assert found.exit_code == 0, found.output
    plan = json.loads(found.stdout)
    assert plan["rank"] == 2  # 100 bases span both columns of the widest factor (48)
    assert plan["modules"] == 14
    assert not setting["out"].exists()
    assert json.loads(basis(*words(setting, "--bases", "40", "--dry-run", "--json")).stdout)["rank"] == 1
