"""Outputs of every kind of transform, made once: what the reports in these tests are of."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest

import basiscli
from tests import kv_models
from tests.conftest import add, make_tensors, write_checkpoint

RATIOS = (0.25, 0.5)


@dataclass(frozen=True)
class Outputs:
    """Folders by what made them, and what `basis eval` said of the compressed ones."""

    folders: dict[str, Path]
    evaluations: list[Path]

    def __getitem__(self, name: str) -> Path:
        return self.folders[name]


@pytest.fixture(scope="session")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Outputs:
    """Return small outputs of merge, init, extract and compress."""
    place = tmp_path_factory.mktemp("outputs")
    base = make_tensors(0)
    models = [write_checkpoint(place / "base", base)]
    models += [write_checkpoint(place / name, add(base, make_tensors(n))) for n, name in enumerate("abc", 1)]
    (place / "text.txt").write_text(kv_models.make_text(3000))
    llama = kv_models.save_model(place / "llama", kv_models.make_model())
    text = place / "text.txt"
    quick = {"calibration": text, "length": 32, "device": "cpu"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT and transformers have opinions on tiny models
        found = {
            "merge": basiscli.merge(models[1:], method="ortho", base=models[0], output=place / "merged").path,
            "linear": basiscli.merge(models[1:], method="linear", output=place / "linear").path,
            "init": basiscli.init(llama, method="pissa", rank=4, output=place / "pissa").path,
            "nf4": basiscli.init(llama, method="pissa", rank=4, quantize="nf4", output=place / "nf4").path,
            "data": basiscli.init(
                llama, method="eva", rank=4, calibration=text, tokens=512, length=32, output=place / "eva"
            ).path,
            "extract": basiscli.extract(models[1], base=models[0], energy=0.9, output=place / "extracted").path,
            "compress": basiscli.compress(llama, kv_ratio=RATIOS[0], train_steps=8, output=place / "kv", **quick).path,
        }
        found["again"] = basiscli.compress(
            found["compress"], kv_ratio=RATIOS[1], search="uniform", output=place / "kv-again", **quick
        ).path
        tuned = kv_models.save_model(place / "tuned", kv_models.make_model(seed=1))
        lora = basiscli.extract(tuned, base=llama, rank=2, output=place / "lora").path
        found["nola"] = basiscli.compress_adapter(
            lora, base=llama, bases=8, steps=2, force=True, output=place / "nola", **quick
        ).path
        evaluations = []
        for name in ("compress", "again"):
            seen = basiscli.evaluate(
                found[name], text=text, against=llama, length=32, windows=2, contexts=[8], new_tokens=2, device="cpu"
            )
            evaluations.append(place / f"eval-{name}.json")
            evaluations[-1].write_text(json.dumps(seen.as_dict()))
    return Outputs(found, evaluations)
