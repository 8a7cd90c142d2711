"""From the words that name a model to its files: paths, pickles, the Hub (a cache laid out by hand, a tiny server)."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors.torch import save_file

import basiscli
from basiscli import HubError, InputError
from basiscli.checkpoints.views import Checkpoint
from basiscli.hub.resolve import resolve
from tests.conftest import LLAMA, Tensors, basis_process, make_tensors, read_checkpoint, write_checkpoint

MAIN, DEV = "1" * 40, "2" * 40  # commits
TOKEN = "hf_" + "S3cret" * 6
QUERY = "model.layers.0.self_attn.q_proj"


def assert_holds(checkpoint: Checkpoint, expected: Tensors) -> None:
    assert checkpoint.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        found = checkpoint.read(name)
        assert found.dtype == tensor.dtype, name
        assert torch.equal(found, tensor), name


def open_model(spec: str | Path) -> Checkpoint:
    return Checkpoint.open(resolve(str(spec)))


# Paths ----------------------------------------------------------------------------------------------------------------


def test_a_folder(family: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(family["a"].parent)
    source = resolve("a")
    assert (source.spec, source.path, source.folder) == ("a", family["a"], family["a"])
    assert (source.repo_id, source.revision, source.label) == (None, None, "a")
    assert source.config == LLAMA
    assert_holds(Checkpoint.open(source), read_checkpoint(family["a"]))


def test_a_single_file(family: dict[str, Path]) -> None:
    source = resolve(str(family["a"] / "model.safetensors"))
    assert (source.path, source.folder) == (family["a"] / "model.safetensors", family["a"])
    assert source.config == LLAMA
    assert_holds(Checkpoint.open(source), read_checkpoint(family["a"]))


def test_one_file_of_several(family: dict[str, Path]) -> None:
    save_file({"other": torch.ones(2)}, family["a"] / "other.safetensors")
    assert_holds(open_model(family["a"] / "other.safetensors"), {"other": torch.ones(2)})


def test_shards_with_an_index(tmp_path: Path) -> None:
    tensors = make_tensors(0)
    write_checkpoint(tmp_path / "model", tensors, shards=3)
    assert_holds(open_model(tmp_path / "model"), tensors)


def test_the_home_folder(family: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(family["a"].parent))
    assert resolve("~/a").path == family["a"]


def test_a_folder_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "org" / "name", make_tensors(0))
    monkeypatch.chdir(tmp_path)
    source = resolve("org/name")
    assert (source.path, source.repo_id) == (tmp_path / "org" / "name", None)


@pytest.mark.parametrize(
    "spec",
    [
        "name", "./org/name", "../org/name", "/no/where", "~/no/where", "~nobody-here/x", "org/name/file", "org/name@",
        "org/na me", "org/name@a b", "-org/name", "https://hub/org/name",
    ],
)  # fmt: skip
def test_what_is_neither_a_path_nor_a_hub_id(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        resolve(spec)
    assert caught.value.what == f"no such model: {spec}"
    assert caught.value.remedy is not None and "org/name@revision" in caught.value.remedy


# Pickles --------------------------------------------------------------------------------------------------------------


def write_pickle(folder: Path, state: object, **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    torch.save(state, folder / "pytorch_model.bin", **options)
    return folder


def conversions() -> list[Path]:
    return sorted(Path(os.environ["BASIS_CACHE"], "converted").glob("*"))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "in state_dict"])
def test_a_pickle_holds_what_it_held(tmp_path: Path, legacy: bool, nested: bool) -> None:
    tensors = make_tensors(0) | {
        "half": torch.arange(6).reshape(2, 3).half(),
        "brain": torch.arange(4).bfloat16(),
        "whole": torch.arange(5),
        "across": torch.arange(6.0).reshape(2, 3).T,
    }
    state = {"state_dict": tensors, "epoch": 3} if nested else tensors
    folder = write_pickle(tmp_path / "model", state, _use_new_zipfile_serialization=not legacy)
    assert_holds(open_model(folder), tensors)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_a_single_pickle(tmp_path: Path, suffix: str) -> None:
    torch.save(make_tensors(0), tmp_path / f"weights{suffix}")
    assert_holds(open_model(tmp_path / f"weights{suffix}"), make_tensors(0))


def test_a_pickle_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_pickle(tmp_path / "model", make_tensors(0))
    first = open_model(folder)
    (place,) = conversions()
    assert first.files == [place / "model.safetensors"]
    monkeypatch.setattr("basiscli.checkpoints.convert.load_pickle", lambda file: pytest.fail(f"read {file} again"))
    assert_holds(open_model(folder), make_tensors(0))
    assert conversions() == [place]
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "pytorch_model.bin"]


def test_a_pickle_that_changed_is_converted_anew(tmp_path: Path) -> None:
    folder = write_pickle(tmp_path / "model", make_tensors(0))
    open_model(folder)
    os.utime(write_pickle(folder, make_tensors(1)) / "pytorch_model.bin", ns=(0, 0))
    assert_holds(open_model(folder), make_tensors(1))


def test_a_config_that_changed_beside_a_pickle_counts(tmp_path: Path) -> None:
    folder = write_pickle(tmp_path / "model", make_tensors(0))
    open_model(folder)
    (folder / "config.json").write_text(json.dumps(LLAMA | {"rope_theta": 5}))
    assert open_model(folder).config["rope_theta"] == 5


def test_a_merge_onto_a_pickle_has_the_files_of_one_onto_safetensors(family: dict[str, Path], tmp_path: Path) -> None:
    pickled = write_pickle(tmp_path / "pickled", read_checkpoint(family["base"]))
    pooling = json.dumps([{"path": "1_Pooling"}])
    for folder in (family["base"], pickled):
        (folder / "1_Pooling").mkdir()
        beside = {"modules.json": pooling, "1_Pooling/config.json": "{}", "NOTICE": "", "a.spm": "", "a.tiktoken": ""}
        for name, text in (beside | {"tokenizer.json": "{}", "LICENSE": ""}).items():
            (folder / name).write_text(text)
    names = []
    for base in (family["base"], pickled):
        out = tmp_path / f"onto-{base.name}"
        basiscli.merge([family["a"], family["b"]], method="task_arithmetic", base=base, output=out)
        names.append(sorted(str(file.relative_to(out)) for file in out.rglob("*")))
    assert names[1] == names[0]


def test_pickled_shards_with_an_index(tmp_path: Path) -> None:
    tensors, folder = make_tensors(0), tmp_path / "model"
    folder.mkdir()
    where = {name: f"pytorch_model-{1 + i % 2:05d}-of-00002.bin" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        torch.save({name: tensors[name] for name in where if where[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    checkpoint = open_model(folder)
    assert_holds(checkpoint, tensors)
    assert len(checkpoint.files) == 2


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
def test_a_tied_tensor_is_written_once(tmp_path: Path, legacy: bool) -> None:
    embedding = torch.randn(50, 24)
    state = {"embed.weight": embedding, "first_rows.weight": embedding[:10], "lm_head.weight": embedding}
    folder = write_pickle(tmp_path / "model", state, _use_new_zipfile_serialization=not legacy)
    assert_holds(open_model(folder), {"embed.weight": embedding, "first_rows.weight": embedding[:10]})


class Trap:
    """Unpickled by Python, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("form", ["zip", "before torch 1.6", "plain pickle"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin"])
def test_a_pickle_that_would_run_code_does_not(tmp_path: Path, form: str, name: str) -> None:
    sprung, folder = tmp_path / "sprung", tmp_path / "model"
    folder.mkdir()
    state = {"weight": torch.ones(2), "trap": Trap(sprung)}
    if form == "plain pickle":
        (folder / name).write_bytes(pickle.dumps({"trap": Trap(sprung)}))
    else:
        torch.save(state, folder / name, _use_new_zipfile_serialization=form == "zip")
    if name.startswith("adapter"):
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(InputError) as caught:
        basiscli.inspect(folder)
    assert "without running code" in caught.value.what
    assert caught.value.file == str(folder / name)
    assert caught.value.remedy == "ask its author for safetensors"
    assert not sprung.exists()
    assert conversions() == []


# The Hub: a cache -----------------------------------------------------------------------------------------------------

Files = Mapping[str, bytes]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def add_to_cache(cache: Path, repo_id: str, files: Files, commit: str = MAIN, branch: str = "main") -> Path:
    """Lay out a snapshot as huggingface_hub does; return its folder."""
    root = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot, blobs, ref = root / "snapshots" / commit, root / "blobs", root / "refs" / branch
    for name, content in files.items():
        blob = blobs / hashlib.sha256(content).hexdigest()
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        blobs.mkdir(exist_ok=True)
        blob.write_bytes(content)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(commit)
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the Hub's cache, with the network off."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_hub_id_from_the_cache(cache: Path, family: dict[str, Path]) -> None:
    snapshot = add_to_cache(cache, "org/name", files_of(family["a"]))
    source = resolve("org/name")
    assert (source.path, source.repo_id, source.revision) == (snapshot, "org/name", MAIN)
    assert (source.spec, source.label) == ("org/name", f"org/name@{MAIN}")
    assert_holds(Checkpoint.open(source), read_checkpoint(family["a"]))


@pytest.mark.parametrize("revision, commit", [("main", MAIN), ("dev", DEV), ("pr/2", DEV), (MAIN, MAIN), (DEV, DEV)])
def test_a_revision_by_branch_and_by_commit(cache: Path, family: dict[str, Path], revision: str, commit: str) -> None:
    models = {
        MAIN: add_to_cache(cache, "org/name", files_of(family["a"])),
        DEV: add_to_cache(cache, "org/name", files_of(family["b"]), DEV, "dev"),
    }
    (cache / "models--org--name" / "refs" / "pr").mkdir()
    (cache / "models--org--name" / "refs" / "pr" / "2").write_text(DEV)
    source = resolve(f"org/name@{revision}")
    assert (source.path, source.repo_id, source.revision) == (models[commit], "org/name", commit)
    assert_holds(Checkpoint.open(source), read_checkpoint(models[commit]))


def test_a_pickle_from_the_cache_keeps_its_revision(cache: Path, tmp_path: Path) -> None:
    add_to_cache(cache, "org/old", files_of(write_pickle(tmp_path / "old", make_tensors(0))))
    checkpoint = open_model("org/old")
    assert (checkpoint.source.repo_id, checkpoint.source.revision) == ("org/old", MAIN)
    assert_holds(checkpoint, make_tensors(0))


@pytest.mark.parametrize("spec", ["org/other", "org/name@dev", f"org/name@{DEV}"])
def test_what_the_cache_lacks_while_offline(cache: Path, family: dict[str, Path], spec: str) -> None:
    add_to_cache(cache, "org/name", files_of(family["a"]))
    with pytest.raises(HubError) as caught:
        resolve(spec)
    assert caught.value.what == f"{spec} is not in the cache, and the Hub cannot be reached"
    assert caught.value.exit_code == 5
    assert caught.value.remedy == "connect, unset HF_HUB_OFFLINE, or give the path of a local copy"


def test_a_cache_that_holds_only_the_configuration_while_offline(cache: Path) -> None:
    add_to_cache(cache, "org/name", {"config.json": b"{}"})
    with pytest.raises(HubError) as caught:
        resolve("org/name")
    assert "HF_HUB_OFFLINE" in str(caught.value)


# The Hub: bases -------------------------------------------------------------------------------------------------------


def write_adapter(folder: Path, base: str | None, **options: object) -> Path:
    folder.mkdir()
    shapes = {"A": (2, 24), "B": (24, 2)}
    factors = {f"base_model.model.{QUERY}.lora_{part}.weight": torch.randn(shape) for part, shape in shapes.items()}
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(config | options))
    return folder


def base_of(adapter: Path, base: str | None = None) -> tuple[str | None, str | None]:
    """Return the Hub id and revision of the base that a merge takes."""
    plan = basiscli.plan_merge([adapter], method="ortho", base=base, output=adapter.parent / "out")
    plan.close()
    assert plan.base is not None
    return plan.base.source.repo_id, plan.base.source.revision


def test_an_adapter_names_its_base_on_the_hub(cache: Path, family: dict[str, Path], tmp_path: Path) -> None:
    add_to_cache(cache, "org/name", files_of(family["base"]))
    assert base_of(write_adapter(tmp_path / "adapter", "org/name")) == ("org/name", MAIN)


def test_an_adapter_names_the_revision_of_its_base(cache: Path, family: dict[str, Path], tmp_path: Path) -> None:
    add_to_cache(cache, "org/name", files_of(family["a"]))
    add_to_cache(cache, "org/name", files_of(family["base"]), DEV, "dev")
    assert base_of(write_adapter(tmp_path / "adapter", "org/name", revision="dev")) == ("org/name", DEV)


def test_another_base_than_the_adapter_names(cache: Path, family: dict[str, Path], tmp_path: Path) -> None:
    add_to_cache(cache, "org/other", files_of(family["base"]))
    adapter = write_adapter(tmp_path / "adapter", "org/name")
    with pytest.raises(InputError) as caught:
        base_of(adapter, "org/other")
    assert caught.value.what == "the adapter's base is org/name, not org/other"
    assert caught.value.file == str(adapter)
    assert caught.value.remedy is not None and "local path" in caught.value.remedy


@pytest.mark.parametrize("named", ["org/name", "Org/Name", "name", "/home/else/models/name", "../models/name", None])
def test_a_base_that_may_be_the_one_that_the_adapter_names(
    cache: Path, family: dict[str, Path], tmp_path: Path, named: str | None
) -> None:
    add_to_cache(cache, "org/name", files_of(family["base"]))
    assert base_of(write_adapter(tmp_path / "adapter", named), "org/name") == ("org/name", MAIN)


def test_a_local_base_is_taken_whatever_the_adapter_names(family: dict[str, Path], tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", "org/name")
    assert base_of(adapter, str(family["base"])) == (None, None)


# The Hub: a server ----------------------------------------------------------------------------------------------------


@dataclass
class Hub:
    """What a tiny Hub holds, how it refuses, and what it was asked."""

    models: dict[str, dict[str, Files]] = field(default_factory=dict)
    """Of each model, the files of each commit."""
    branches: dict[str, str] = field(default_factory=lambda: {"main": MAIN, "dev": DEV})
    refusal: tuple[int, dict[str, str]] | None = None
    """Status and headers of the answer to everything, or to files only."""
    refuses_files_only: bool = False
    asked: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    address: str = ""

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body for a path."""
        match = re.fullmatch(r"/(?:api/models/)?(\w+/\w+)(?:/(revision|tree|resolve)/([^/]+)/?(.*))?", path)
        assert match is not None, path
        repo_id, what, revision, name = match.groups()
        if self.refusal and (what == "resolve" or not self.refuses_files_only):
            return *self.refusal, b"{}"
        if repo_id not in self.models:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        commit = self.branches.get(revision or "main", revision)
        files = self.models[repo_id].get(commit)
        if files is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if what == "resolve":
            etag = hashlib.sha256(files[name]).hexdigest()
            return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, files[name]
        listing = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in files.items()]
        info = {"id": repo_id, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
        return 200, {"Content-Type": "application/json"}, json.dumps(listing if what == "tree" else info).encode()


@pytest.fixture
def hub() -> Iterator[Hub]:
    """Return a Hub that listens on this machine."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(path)
            hub.tokens.add(self.headers["Authorization"])
            status, headers, body = hub.answer(path)
            self.send_response(HTTPStatus(status))
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *words: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


def basis_online(hub: Hub, home: Path, *words: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command line with a Hub and a token, which nothing that it says or writes may hold."""
    settings = {
        "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home / "hf"), "HF_TOKEN": TOKEN,
        "HF_HUB_CACHE": str(home / "hf" / "hub"), "HF_HUB_ETAG_TIMEOUT": "2", "HF_HUB_DOWNLOAD_TIMEOUT": "2",
        "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    done = basis_process(*words, cwd=home, **settings | env)
    assert TOKEN not in done.stdout + done.stderr
    return done


def test_models_of_the_hub_are_merged_and_their_commits_recorded(
    hub: Hub, family: dict[str, Path], tmp_path: Path
) -> None:
    names = {name: files_of(folder) for name, folder in family.items()}
    card = {"README.md": b"---\nbase_model: org/base\nlicense: mit\n---\n"}
    hub.models = {
        "org/base": {MAIN: names["base"]},
        "org/a": {MAIN: names["a"] | card},
        "org/b": {MAIN: names["c"] | card, DEV: names["b"] | card},
    }
    done = basis_online(hub, tmp_path, "merge", "org/a", "org/b@dev", "-m", "task_arithmetic", "-o", "out")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "basis_report.json").read_text())
    assert [(s["role"], s["repo_id"], s["revision"]) for s in report["sources"]] == [
        ("base", "org/base", MAIN),
        ("model", "org/a", MAIN),
        ("model", "org/b", DEV),
    ]
    models, base = [family["a"], family["b"]], family["base"]
    local = basiscli.merge(models, method="task_arithmetic", base=base, output=tmp_path / "local")
    assert report["weights_digest"] == local.report.weights_digest
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert not any(TOKEN.encode() in content for content in files_of(tmp_path / "out").values())


def test_only_what_makes_a_model_is_downloaded_and_once(hub: Hub, family: dict[str, Path], tmp_path: Path) -> None:
    extra = ["code.py", "pytorch_model.bin", "optimizer.pt", "onnx/model.onnx", "fp16/model.safetensors", "model.h5"]
    hub.models = {"org/a": {MAIN: files_of(family["a"]) | dict.fromkeys(extra, b"?")}}
    for _ in range(2):
        assert basis_online(hub, tmp_path, "verify", "org/a").returncode == 0
    asked = [path.rpartition("/resolve/")[2] for path in hub.asked if "/resolve/" in path]
    assert set(asked) == {f"{MAIN}/{name}" for name in files_of(family["a"])}
    downloads = len(hub.asked)
    assert basis_online(hub, tmp_path, "verify", "org/a", HF_HUB_OFFLINE="1").returncode == 0
    assert len(hub.asked) == downloads


def test_pickles_are_downloaded_where_there_is_no_safetensors(hub: Hub, tmp_path: Path) -> None:
    hub.models = {"org/old": {MAIN: files_of(write_pickle(tmp_path / "old", make_tensors(0)))}}
    assert basis_online(hub, tmp_path, "verify", "org/old").returncode == 0
    done = basis_online(hub, tmp_path, "inspect", "org/old", "--tensors", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {tensor["name"] for tensor in found["tensors"]} == set(make_tensors(0))
    assert found["revision"] == MAIN


def test_a_model_without_weights(hub: Hub, tmp_path: Path) -> None:
    hub.models = {"org/a": {MAIN: {"config.json": b"{}"}}}
    done = basis_online(hub, tmp_path, "inspect", "org/a")
    assert done.returncode == 3
    assert "org/a holds no weights (.safetensors, .bin or .gguf)" in done.stderr


NO_SUCH = "there is no model org/a on the Hub, or it is private"
GATED = (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model org/a is restricted"})
REFUSALS: dict[str, tuple[tuple[int, dict[str, str]], str, str]] = {
    "unknown": ((404, {"X-Error-Code": "RepoNotFound"}), NO_SUCH, "check the spelling"),
    "private": ((401, {"X-Error-Code": "RepoNotFound"}), NO_SUCH, "`hf auth login`"),
    "token": (
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
        "the Hub answered 401 for org/a",
        "`hf auth login`",
    ),
    "gated": (GATED, "org/a is gated: your account has no access", "ask for access"),
    "forbidden": ((403, {}), "the Hub answered 403 for org/a", "`hf auth login`"),
    "limited": ((429, {}), "the Hub answered 429 for org/a", "too many requests"),
    "down": ((503, {}), "the Hub answered 503 for org/a", "try again later"),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_the_hub_refuses(hub: Hub, tmp_path: Path, reason: str) -> None:
    hub.refusal, cause, remedy = REFUSALS[reason]
    done = basis_online(hub, tmp_path, "merge", "org/a", "org/b", "-m", "linear", "-o", "out")
    assert done.returncode == 5
    assert f"error: {cause}\n" in done.stderr
    assert re.search(f"^  to do: .*{remedy}", done.stderr, re.MULTILINE), done.stderr
    assert not (tmp_path / "out").exists()


def test_a_gated_model_whose_list_of_files_is_public(hub: Hub, family: dict[str, Path], tmp_path: Path) -> None:
    hub.models = {"org/a": {MAIN: files_of(family["a"])}}
    hub.refusal, hub.refuses_files_only = GATED, True
    done = basis_online(hub, tmp_path, "inspect", "org/a")
    assert done.returncode == 5
    assert "error: org/a is gated: your account has no access\n" in done.stderr


def test_a_revision_that_the_hub_does_not_have(hub: Hub, family: dict[str, Path], tmp_path: Path) -> None:
    hub.models = {"org/a": {MAIN: files_of(family["a"])}}
    done = basis_online(hub, tmp_path, "inspect", "org/a@nope")
    assert done.returncode == 5
    assert "error: org/a has no revision 'nope'\n" in done.stderr
    assert "  to do: give a branch, a tag or a full commit hash after the @\n" in done.stderr


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    with socket.socket() as deaf:  # bound, and not listening
        deaf.bind(("127.0.0.1", 0))
        hub = Hub(address=f"http://127.0.0.1:{deaf.getsockname()[1]}")
        done = basis_online(hub, tmp_path, "inspect", "org/a")
    assert done.returncode == 5
    assert "error: org/a is not in the cache, and the Hub cannot be reached\n" in done.stderr
    assert "  to do: connect" in done.stderr
