"""Models of the Hub by their headers alone: what is fetched, what it says, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import save
from typer.testing import Result

import basiscli
from basiscli import HubError, InputError, UsageError
from basiscli.checkpoints.header import header_end
from basiscli.commands.nola.api import compress_adapter
from basiscli.hub.headers import _FIRST
from basiscli.hub.resolve import resolve
from basiscli.names import format_size
from tests.conftest import add, read_checkpoint, snapshot, write_checkpoint
from tests.hub_server import TOKEN, Fault, Hub, files_of
from tests.recipes.models import write_llama, write_recipe

Basis = Callable[..., Result]
MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
MODEL_ONE = "model-00001-of-00002.safetensors"
DRY = ["-m", "linear", "--dry-run", "--json"]


@pytest.fixture
def models(hub: Hub, tmp_path: Path) -> dict[str, Path]:
    """Return folders of a base and two fine-tunes in two shards each, which the Hub has as `org/base` and so on."""
    torch.manual_seed(0)
    names = [f"model.layers.{n}.mlp.up_proj.weight" for n in range(4)]
    base = {name: torch.randn(400, 400) for name in names}
    folders = {}
    for name in ("base", "a", "b"):
        tensors = base if name == "base" else add(base, {n: torch.randn(400, 400) for n in base})
        folders[name] = write_checkpoint(tmp_path / "here" / name, tensors, shards=2)
        hub.add(f"org/{name}", files_of(folders[name]))
    return folders


def headers_of(folder: Path) -> int:
    """Return how many bytes the headers of a folder have."""
    return sum(header_end(file.read_bytes()[:8]) for file in folder.glob("*.safetensors"))


def kept() -> list[Path]:
    """Return every file that the cache of headers holds."""
    return sorted(file for file in Path(os.environ["BASIS_CACHE"]).rglob("*") if file.is_file())


# What is fetched ------------------------------------------------------------------------------------------------------


def test_a_dry_run_is_the_same_as_on_the_weights_and_fetches_none(
    hub: Hub, models: dict[str, Path], basis: Basis, tmp_path: Path
) -> None:
    words = ["-p", "normalize=false", "-o", tmp_path / "out", *DRY]
    result = basis("merge", "org/a", "org/b@main", *words)
    assert result.exit_code == 0, result.stderr
    assert hub.served <= 4 * _FIRST  # four shards
    found, expected = json.loads(result.stdout), json.loads(basis("merge", models["a"], models["b"], *words).stdout)
    weights = 2 * 4 * 400 * 400 * 4
    assert found["price"].pop("download_bytes") == weights
    assert expected["price"].pop("download_bytes") == 0
    assert found.pop("models") == ["org/a", "org/b@main"]
    del expected["models"]
    assert found == expected
    assert len([file for file in kept() if file.name.endswith(".safetensors")]) == 4
    assert sum(map(len, snapshot(Path(os.environ["BASIS_CACHE"])).values())) < 10_000
    hub.asked.clear()
    again = basis("merge", "org/a", "org/b@main", "-m", "linear", "-o", tmp_path / "out", "--dry-run")
    assert "\ndownload 5.1 MB, then " in again.stdout
    assert hub.asked == ["GET /api/models/org/a", "GET /api/models/org/b/revision/main"]


def test_weights_that_are_here_are_not_to_be_downloaded(
    hub: Hub, models: dict[str, Path], basis: Basis, tmp_path: Path
) -> None:
    dry = ["merge", "org/a", "org/b", "-o", tmp_path / "out", *DRY]
    assert json.loads(basis(*dry).stdout)["price"]["download_bytes"] > 0
    whole = resolve("org/a").path
    assert files_of(whole) == files_of(models["a"])
    assert json.loads(basis(*dry).stdout)["price"]["download_bytes"] == 4 * 400 * 400 * 4  # b's
    assert resolve("org/a", headers_only=True).path == whole
    done = basis("merge", "org/a", "org/b", "-m", "linear", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert json.loads(basis(*dry, "--overwrite").stdout)["price"]["download_bytes"] == 0


@pytest.mark.parametrize(
    "words", [["init", "org/a", "-r", "4"], ["extract", "org/a", "--base", "org/base", "-r", "4"]], ids=lambda w: w[0]
)
def test_adapters_are_priced_alike(
    hub: Hub, models: dict[str, Path], basis: Basis, tmp_path: Path, words: list[str]
) -> None:
    local = [str(models[word.removeprefix("org/")]) if word.startswith("org/") else word for word in words]
    dry = ["-o", tmp_path / "out", "--dry-run", "--json"]
    result = basis(*words, *dry)
    assert result.exit_code == 0, result.stderr
    found, expected = json.loads(result.stdout), json.loads(basis(*local, *dry).stdout)
    count = sum(word.startswith("org/") for word in words)
    assert found["price"].pop("download_bytes") == count * 4 * 400 * 400 * 4
    assert expected["price"].pop("download_bytes") == 0
    assert (found["price"], found["modules"]) == (expected["price"], expected["modules"])
    assert hub.served <= 2 * count * _FIRST


def test_inspect(hub: Hub, models: dict[str, Path], basis: Basis) -> None:
    found, expected = (
        json.loads(basis("inspect", spec, "--tensors", "--json").stdout) for spec in ("org/a", models["a"])
    )
    assert found["facts"].pop("to download") == "2.6 MB"
    assert [found[key] for key in ("facts", "groups", "tensors")] == [
        expected[key] for key in ("facts", "groups", "tensors")
    ]
    assert hub.served <= 2 * _FIRST
    local = json.loads(basis("inspect", found["path"], "--json").stdout)  # the folder that it names can be inspected
    assert local["facts"]["data"].startswith("not here")


def test_adapters_and_the_base_that_they_name(hub: Hub, models: dict[str, Path], basis: Basis, tmp_path: Path) -> None:
    for name in ("a", "b"):
        folder = tmp_path / f"{name}-lora"
        basiscli.extract(models[name], base=models["base"], rank=100, output=folder)
        config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": "org/base"}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        hub.add(f"org/{name}-lora", files_of(folder))
    loras = ["org/a-lora", "org/b-lora"]
    result = basis("merge", *loras, "-m", "ortho", "-o", tmp_path / "out", "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    adapters = 2 * 4 * 2 * 400 * 100 * 4
    assert (found["price"]["download_bytes"], found["base"]) == (adapters + 4 * 400 * 400 * 4, "org/base")
    assert hub.served <= 4 * _FIRST
    local = [tmp_path / "a-lora", tmp_path / "b-lora", "--base", models["base"]]
    whole = json.loads(basis("merge", *local, "-m", "ortho", "-o", tmp_path / "out", "--dry-run", "--json").stdout)
    assert whole["price"] | {"download_bytes": 0} == found["price"] | {"download_bytes": 0}
    seen = json.loads(basis("inspect", "org/a-lora", "--json").stdout)
    assert (seen["kind"], seen["facts"]["rank"], seen["facts"]["to download"]) == ("adapter", 100, "1.3 MB")


def test_an_adapter_that_saved_the_head_beside_its_twin(hub: Hub, family: dict[str, Path], tmp_path: Path) -> None:
    prefix, wide = "base_model.model.", torch.ones(50, 24)
    query = f"{prefix}model.layers.0.self_attn.q_proj.lora_"
    tensors = {
        f"{query}A.weight": torch.ones(2, 24), f"{query}B.weight": torch.ones(24, 2),
        f"{prefix}model.embed_tokens.weight": wide, f"{prefix}lm_head.weight": wide.clone(),
    }  # fmt: skip
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": str(family["base"])}
    files = {"adapter_model.safetensors": save(tensors), "adapter_config.json": json.dumps(config).encode()}
    hub.add("org/lora", files)
    plan = basiscli.plan_merge(["org/lora", "org/lora"], method="linear", output=tmp_path / "out", headers_only=True)
    assert plan.models[0].source.is_remote
    assert "lm_head.weight" not in plan.merged
    made = basiscli.merge(["org/lora", "org/lora"], method="linear", output=tmp_path / "out")
    assert made.report.numbers["tensors"] == len(plan.merged) + len(plan.copied)


def test_a_recipe_of_mergekit(hub: Hub, models: dict[str, Path], basis: Basis, tmp_path: Path) -> None:
    recipe = {"merge_method": "linear", "models": [{"model": f"org/{n}", "parameters": {"weight": 1}} for n in "ab"]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = basis("run", tmp_path / "recipe.yaml", "-o", tmp_path / "out", "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    whole = json.loads(basis("merge", models["a"], models["b"], "-o", tmp_path / "out", *DRY).stdout)["price"]
    assert json.loads(result.stdout)["price"] == whole | {"download_bytes": 2 * 4 * 400 * 400 * 4}
    assert hub.served <= 4 * _FIRST
    assert basis("run", tmp_path / "recipe.yaml", "-o", tmp_path / "out").exit_code == 0


@pytest.fixture
def decoders(hub: Hub, tmp_path: Path) -> dict[str, Path]:
    """Return folders of two decoders with tokenizers that differ, which the Hub has as `org/x` and `org/y`."""
    folders = {}
    for seed, name in enumerate("xy"):
        folders[name] = tmp_path / "here" / name
        write_llama(folders[name], seed, [f"of_{name}"], hidden_size=128, intermediate_size=400)
        hub.add(f"org/{name}", files_of(folders[name]))
    return folders


def dry(basis: Basis, *words: str | Path) -> dict[str, Any]:
    """Return what a dry run says, but for what it calls its models and what is to be downloaded."""
    result = basis(*words, "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    for name in ("model", "models", "adapter", "base"):
        found.pop(name, None)
    found.get("price", {}).pop("download_bytes", None)
    return found


def test_compressions_are_priced_alike(
    hub: Hub, decoders: dict[str, Path], basis: Basis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ["--kv-ratio", "0.5", "-o", tmp_path / "out"]
    assert dry(basis, "compress", "org/x", *cache) == dry(basis, "compress", decoders["x"], *cache)
    weights = sum(t.nbytes for t in read_checkpoint(decoders["x"]).values())
    result = basis("compress", "org/x", *cache, "--dry-run")
    assert f"\ndownload {format_size(weights)}, then " in result.stdout
    basiscli.init(decoders["x"], rank=2, output=tmp_path / "lora", method="pissa", target_modules=["q_proj"])
    adapter = tmp_path / "lora" / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": "org/x"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    nola = ["compress", adapter, "-m", "nola", "--bases", "20", "-o", tmp_path / "out"]
    assert dry(basis, *nola) == dry(basis, *nola, "--base", decoders["x"])
    assert hub.served <= _FIRST
    assert not list(tmp_path.glob("out*"))


def test_what_was_planned_on_headers_is_not_carried_out(hub: Hub, decoders: dict[str, Path], tmp_path: Path) -> None:
    adapter = basiscli.init(decoders["x"], rank=2, output=tmp_path / "lora").adapter
    for act in (
        lambda: basiscli.compress("org/x", kv_ratio=0.5, output=tmp_path / "out", headers_only=True),
        lambda: compress_adapter(adapter, base="org/x", bases=9, output=tmp_path / "out", headers_only=True),
    ):
        with pytest.raises(UsageError, match="priced and not carried out"):
            act()
    assert not list(tmp_path.glob("out*"))


def test_a_pipeline(hub: Hub, decoders: dict[str, Path], basis: Basis, tmp_path: Path) -> None:
    def recipe(x: str | Path, y: str | Path) -> Path:
        steps = [
            {"merge": [str(x), str(y)], "name": "both", "method": "linear"},
            {"compress": "both", "name": "small", "kv_ratio": 0.5},
            {"init": str(x), "name": "lora", "rank": 4},
            {"eval": str(y), "name": "figures"},
        ]
        return write_recipe(tmp_path, {"steps": steps})

    remote = dry(basis, "run", recipe("org/x", "org/y"), "-o", tmp_path / "out")["steps"]
    assert hub.served <= 2 * _FIRST
    assert not [file for file in hub.asked if "tokenizer" in file]
    prices = [step["price"] for step in remote]
    x, y = (sum(t.nbytes for t in read_checkpoint(decoders[name]).values()) for name in "xy")
    assert [price and price.pop("download_bytes") for price in prices] == [x + y, 0, x, None]
    local = dry(basis, "run", recipe(decoders["x"], decoders["y"]), "-o", tmp_path / "out")["steps"]
    assert [price and price | {"download_bytes": 0} for price in prices] == [step["price"] for step in local]
    assert [step | {"price": None} for step in remote] == [step | {"price": None} for step in local]


@pytest.mark.parametrize("more", [{"tokenizer_source": "union"}, {"chat_template": "chatml"}])
def test_a_recipe_of_mergekit_with_a_tokenizer(
    hub: Hub, decoders: dict[str, Path], basis: Basis, tmp_path: Path, more: dict[str, str]
) -> None:
    def recipe(x: str | Path, y: str | Path) -> Path:
        models = [{"model": str(name), "parameters": {"weight": 1}} for name in (x, y)]
        return write_recipe(tmp_path, {"merge_method": "linear", "models": models} | more)

    words = ["-o", tmp_path / "out"]
    assert basis("inspect", "org/x").exit_code == 0  # headers without tokenizers are no substitute
    remote = dry(basis, "run", recipe("org/x", "org/y"), *words)
    assert hub.served <= 3 * _FIRST
    assert remote == dry(basis, "run", recipe(decoders["x"], decoders["y"]), *words)
    assert basis("run", recipe("org/x", "org/y"), *words).exit_code == 0
    read = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    shutil.rmtree(tmp_path / "out")
    assert basis("run", recipe(decoders["x"], decoders["y"]), *words).exit_code == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == read["model.safetensors"]


def test_a_long_header_is_fetched_whole_and_nothing_else(hub: Hub, basis: Basis, tmp_path: Path) -> None:
    tensors = {f"model.layers.{n}.some.rather.long.name.weight": torch.zeros(64) for n in range(3000)}
    folder = write_checkpoint(tmp_path / "many", tensors)
    hub.add("org/many", files_of(folder))
    found = json.loads(basis("inspect", "org/many", "--json").stdout)
    assert found["total"]["tensors"] == 3000
    assert headers_of(folder) > 2 * _FIRST
    assert hub.served == _FIRST + headers_of(folder)


def test_a_server_without_ranges_is_let_go(hub: Hub, basis: Basis, tmp_path: Path) -> None:
    hub.ranges = False
    folder = write_checkpoint(tmp_path / "large", {"model.layers.0.mlp.up_proj.weight": torch.zeros(8000, 2000)})
    hub.add("org/large", files_of(folder))
    found = json.loads(basis("inspect", "org/large", "--json").stdout)
    assert (found["total"]["nbytes"], found["facts"]["to download"]) == (64_000_000, "64.0 MB")
    assert hub.served < 32_000_000  # what fits the buffers of two sockets
    assert [file.stat().st_size for file in kept() if file.name == MODEL] == [headers_of(folder)]


def test_the_token_stays_with_the_hub(hub: Hub, models: dict[str, Path], basis: Basis) -> None:
    hub.add("org/private", files_of(models["a"]), private=True)
    assert basis("inspect", "org/private").exit_code == 0
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert hub.tokens_at_storage == {None}


def test_a_branch_that_moves_has_new_headers(hub: Hub, models: dict[str, Path], tmp_path: Path) -> None:
    first = resolve("org/a", headers_only=True)
    wider = write_checkpoint(tmp_path / "wider", {"model.norm.weight": torch.ones(7)})
    moved = hub.add("org/other", files_of(wider)).files("main")
    hub.repos["org/a"].commit(moved)
    second, pinned = (resolve(spec, headers_only=True) for spec in ("org/a", f"org/a@{first.revision}"))
    assert second.revision == hub.repos["org/a"].branches["main"] != first.revision
    assert basiscli.inspect("org/a").total.parameters == 7
    assert pinned.path == first.path != second.path


# Without the Hub ------------------------------------------------------------------------------------------------------


def test_offline(hub: Hub, models: dict[str, Path], basis: Basis, monkeypatch: pytest.MonkeyPatch) -> None:
    here, commit = resolve("org/a"), resolve("org/b", headers_only=True).revision
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve("org/a", headers_only=True) == here
    assert basiscli.inspect(f"org/b@{commit}").facts["to download"] == "2.6 MB"
    for spec in ("org/b", "org/base", f"org/base@{commit}"):  # a branch's commit, only the Hub knows
        result = basis("inspect", spec)
        assert result.exit_code == 5
        assert f"{spec} is not in the cache, and the Hub cannot be reached" in result.stderr


def test_weights_that_are_here_need_no_hub(hub: Hub, models: dict[str, Path], waits: list[float]) -> None:
    here = resolve("org/a")
    hub.faults = [Fault("GET /api", 99, lost=True)]
    assert resolve("org/a", headers_only=True) == here
    assert waits == []


REFUSED = {
    "org/unknown": "there is no model org/unknown on the Hub, or it is private",
    "org/gated": "org/gated is gated: your account has no access",
    "org/a@nope": "org/a has no revision 'nope'",
}


@pytest.mark.parametrize("command", ["inspect", "init", "merge"])
@pytest.mark.parametrize("spec", REFUSED)
def test_what_the_hub_refuses(hub: Hub, models: dict[str, Path], basis: Basis, spec: str, command: str) -> None:
    hub.add("org/gated", files_of(models["a"]), gated=True)
    words = {"inspect": [spec], "init": [spec, "--dry-run"], "merge": [models["a"], spec, *DRY[:-1]]}[command]
    result = basis(command, *words, "--json")
    assert result.exit_code == 5
    assert json.loads(result.stdout)["what"] == REFUSED[spec]
    assert kept() == []


@pytest.mark.parametrize(
    "fault, what",
    [
        (Fault("GET /objects", 99, status=503), "the Hub answered 503 for org/a"),
        (Fault("GET /objects", 99, cut=100), "the connection to the Hub was lost"),
        (Fault("GET /api/models", 99, lost=True), "org/a is not in the cache, and the Hub cannot be reached"),
        (Fault("GET .*config.json", 99, damage=True), "org/a: the bytes of config.json do not have the digest"),
    ],
)
def test_trouble(hub: Hub, models: dict[str, Path], basis: Basis, waits: list[float], fault: Fault, what: str) -> None:
    hub.faults = [fault]
    result = basis("inspect", "org/a", "--json")
    assert result.exit_code == 5
    assert what in json.loads(result.stdout)["what"]
    assert waits
    assert kept() == []
    fault.times = 1  # and trouble that passes
    assert basis("inspect", "org/a").exit_code == 0
    assert fault.times == 0


# Models that have no headers, or lie in them --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model-q4_0.gguf"])
def test_weights_without_headers_are_not_fetched_for_a_price(
    hub: Hub, models: dict[str, Path], basis: Basis, tmp_path: Path, name: str
) -> None:
    files = {"config.json": files_of(models["a"])["config.json"]}
    torch.save({"model.norm.weight": torch.ones(3)}, tmp_path / "weights")
    hub.add("org/old", files | {name: (tmp_path / "weights").read_bytes()})
    for words in (["merge", "org/old", "org/a", *DRY], ["inspect", "org/old", "--json"]):
        result = basis(*words)
        assert result.exit_code == 3
        assert json.loads(result.stdout)["what"].startswith("org/old has no safetensors")
        assert "`hf download org/old`" in result.stderr
    assert hub.served == 0
    if name.endswith(".bin"):
        resolve("org/old")
        assert basiscli.inspect("org/old").total.parameters == 3


def test_no_weights_at_all(hub: Hub, basis: Basis) -> None:
    hub.add("org/data", {"README.md": b"text", "onnx/model.onnx": b"", "sub/model.safetensors": b""})
    result = basis("inspect", "org/data")
    assert (result.exit_code, "org/data holds no weights" in result.stderr) == (3, True)


def header(table: object, data: int = 0, length: int | None = None) -> bytes:
    raw = table if isinstance(table, bytes) else json.dumps(table).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + bytes(data)


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HOSTILE = {
    "empty": (b"", "only 0 bytes long"),
    "too short": (b"1234", "only 4 bytes long"),
    "2^60 bytes of header": (header({}, data=500_000, length=2**60), f"its header claims {2**60} bytes"),
    "longer than allowed": (header({}, data=500_000, length=100_000_001), "its header claims 100000001 bytes"),
    "longer than the file": (header({}, data=300_000, length=400_000), "its header claims 400000 bytes"),
    "no JSON": (header(b"{]", data=1000), "the header is not valid JSON"),
    "data cut off": (header({"w": entry(0, 4000, [1000])}, data=3999), "truncated: the tensor ends at byte"),
    "more data": (header({"w": entry(0, 4000, [1000])}, data=4001), "the header lies: the tensors end at byte"),
    "a hole": (header({"w": entry(4, 8, [1])}, data=8), "leaves a hole before it"),
    "an overlap": (header({"v": entry(0, 8, [2]), "w": entry(4, 8, [1])}, data=8), "overlaps the one before it"),
    "other sizes": (header({"w": entry(0, 8, [3])}, data=8), "dtype and shape need 12 bytes"),
    "petabytes": (header({"w": entry(0, 2**52, [2**50])}, data=8), "truncated: the tensor ends at byte"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_header_is_judged_as_that_of_a_file_is(
    hub: Hub, models: dict[str, Path], basis: Basis, waits: list[float], name: str
) -> None:
    content, what = HOSTILE[name]
    repo = hub.add("org/bad", {"config.json": b"{}", MODEL: content})
    result = basis("merge", models["a"], "org/bad", *DRY)
    assert result.exit_code == 3, result.stderr
    error = json.loads(result.stdout)
    assert what in error["what"]
    assert error["file"] == f"org/bad@{repo.branches['main']}/{MODEL}"
    assert hub.served <= (2 * _FIRST + 400_000 if name == "longer than the file" else _FIRST)
    assert kept() == []


def test_names_that_lead_out(hub: Hub, models: dict[str, Path], basis: Basis, tmp_path: Path) -> None:
    files = files_of(models["a"])
    lie = {"weight_map": dict.fromkeys(["w"], "../../../here/a/model-00001-of-00002.safetensors")}
    hub.add("org/index", files | {INDEX: json.dumps(lie).encode()})
    before = snapshot(tmp_path / "here")
    evil = dict.fromkeys(["../evil.safetensors", "..\\evil.safetensors", "/tmp/evil.safetensors"], files[MODEL_ONE])
    hub.add("org/names", files | evil)
    for spec in ("org/index", "org/names"):
        assert basis("inspect", spec).exit_code in (0, 3, 5)
    assert snapshot(tmp_path / "here") == before
    names = {file.name for file in kept()}
    assert not [name for name in names if "evil" in name and "\\" not in name]
    with pytest.raises(InputError, match="which is no safetensors file of this folder"):
        basiscli.inspect("org/index")


@pytest.mark.parametrize("sha", ["../../../evil", "", "a/b", ".."])
def test_a_commit_that_is_none(hub: Hub, models: dict[str, Path], sha: str) -> None:
    listing = {"id": "org/a", "sha": sha, "siblings": [{"rfilename": MODEL}]}
    hub.faults = [Fault("GET /api/models", 99, status=200, body=json.dumps(listing).encode())]
    with pytest.raises(HubError, match="the Hub names no commit of org/a"):
        resolve("org/a", headers_only=True)
    assert kept() == []
