"""The way to the Hub and back, over real HTTP against the small Hub of `hub_server`."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from typer.testing import Result

import basiscli
from basiscli import HubError
from basiscli.hub.resolve import resolve
from tests.conftest import basis_process, make_tensors, read_checkpoint, snapshot, write_checkpoint
from tests.hub_server import SIGNATURE, TOKEN, Fault, Hub, files_of
from tests.kv_models import make_model, make_text, save_model

Basis = Callable[..., Result]
PUT = r"^PUT /objects/"
# What huggingface_hub's HTTP client thinks of how huggingface_hub sends files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")


@pytest.fixture
def merged(family: dict[str, Path], tmp_path: Path) -> Path:
    """Return an output of `basis merge`."""
    models = [family["a"], family["b"]]
    return basiscli.merge(models, method="ortho", base=family["base"], output=tmp_path / "merged").path


def on_hub(hub: Hub, repo_id: str = "org/name", revision: str = "main") -> dict[str, bytes]:
    files = hub.repos[repo_id].files(revision)
    return {name: content for name, content in files.items() if name != ".gitattributes"}


def head(hub: Hub, repo_id: str = "org/name") -> str:
    return hub.repos[repo_id].branches["main"]


def environment(hub: Hub, home: Path, **env: str) -> dict[str, str]:
    """Return the environment of a process that talks to the Hub."""
    settings = {
        "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home / "hf"), "HF_TOKEN": TOKEN,
        "HF_HUB_CACHE": str(home / "hf" / "hub"), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1,localhost",
    }  # fmt: skip
    return settings | env


def assert_no_secret(*texts: str | bytes) -> None:
    for text in texts:
        content = text.encode() if isinstance(text, str) else text
        assert TOKEN.encode() not in content
        assert SIGNATURE.encode() not in content


# There and back -------------------------------------------------------------------------------------------------------


def test_an_output_goes_to_the_hub_and_comes_back(hub: Hub, merged: Path, basis: Basis, tmp_path: Path) -> None:
    result = basis("push", merged, "org/name")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{hub.address}/org/name/commit/{head(hub)}\n"
    assert on_hub(hub) == files_of(merged)
    assert hub.repos["org/name"].messages[head(hub)] == f"merge with basis {basiscli.__version__}"
    again = tmp_path / "again"
    result = basis("merge", "org/name", "org/name@main", "-m", "linear", "-o", again)
    assert result.exit_code == 0, result.stderr
    report = json.loads((again / "basis_report.json").read_text())
    assert [(s["repo_id"], s["revision"]) for s in report["sources"]] == [("org/name", head(hub))] * 2
    assert basis("verify", "org/name").exit_code == 0
    found, expected = read_checkpoint(resolve("org/name").path), read_checkpoint(merged)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_token_goes_to_the_hub_and_nowhere_else(hub: Hub, merged: Path, basis: Basis, tmp_path: Path) -> None:
    told = f"no, Bearer {TOKEN}, not at {hub.storage}/x?{SIGNATURE}"
    hub.faults = [Fault("POST .*/commit/", status=403, headers={"X-Error-Message": told})]
    refused = basis("push", merged, "org/name", "--json")
    assert refused.exit_code == 5
    assert f"for org/name: no, Bearer <token>, not at {hub.storage}/x\n" in refused.stderr
    pushed = basis("push", merged, "org/name", "--json", "--progress", "json")
    pulled = basis("merge", "org/name", "org/name", "-m", "linear", "-o", tmp_path / "out", "--push-to", "org/next")
    assert (pushed.exit_code, pulled.exit_code) == (0, 0), pulled.stderr
    assert hub.tokens <= {f"Bearer {TOKEN}", None}
    assert hub.tokens_at_storage == {None}
    assert_no_secret(*(one.stdout + one.stderr for one in (refused, pushed, pulled)), *snapshot(tmp_path).values())
    assert_no_secret(*(content for repo in ("org/name", "org/next") for content in on_hub(hub, repo).values()))


def test_python(hub: Hub, merged: Path) -> None:
    pushed = basiscli.push(merged, "org/name@trial", message="An attempt")
    assert pushed.url == f"{hub.address}/org/name/commit/{pushed.commit}"
    assert (pushed.repo_id, pushed.revision, pushed.pull_request) == ("org/name", "trial", False)
    assert (pushed.checked_digests, pushed.left_out, pushed.removed) == (True, [], [])
    assert pushed.files == sorted(files_of(merged))
    assert pushed.bytes == sum(map(len, files_of(merged).values()))
    assert hub.repos["org/name"].branches["trial"] == pushed.commit != head(hub)
    assert hub.repos["org/name"].messages[pushed.commit] == "An attempt"


def test_a_pull_request_to_a_model_of_somebody_else(hub: Hub, merged: Path, basis: Basis) -> None:
    repo = hub.add("other/model", {"README.md": b"mine"})
    result = basis("push", merged, "other/model", "--create-pr", "--json")
    document = json.loads(result.stdout)
    assert (document["url"], document["pull_request"]) == (f"{hub.address}/other/model/discussions/1", True)
    assert repo.files("refs/pr/1") == files_of(merged)
    assert repo.files("main") == {"README.md": b"mine"}
    result = basis("push", merged, "other/model")
    assert result.exit_code == 5
    assert "error: the Hub answered 403 for other/model: you may not write here\n" in result.stderr


def test_private_stays_private(hub: Hub, merged: Path, basis: Basis) -> None:
    assert basis("push", merged, "org/name", "--private").exit_code == 0
    assert hub.repos["org/name"].private
    assert basis("push", merged, "org/name", "--private").exit_code == 0
    hub.add("org/public", {})
    result = basis("push", merged, "org/public", "--private")
    assert result.exit_code == 2
    assert "error: org/public exists and is public\n" in result.stderr
    assert on_hub(hub, "org/public") == {}


def test_large_files_in_parts_and_lists_in_pages(hub: Hub, merged: Path, basis: Basis) -> None:
    hub.part_bytes, hub.page = 3000, 2
    assert basis("push", merged, "org/name").exit_code == 0
    assert sum(one.startswith("PUT") for one in hub.asked) == -(-(merged / "model.safetensors").stat().st_size // 3000)
    assert on_hub(hub) == files_of(merged)
    assert {file.name for file in resolve("org/name").path.iterdir()} >= {"model.safetensors", "config.json"}


def test_nothing_is_pushed_twice(hub: Hub, merged: Path, basis: Basis) -> None:
    assert basis("push", merged, "org/name").exit_code == 0
    received, commit = hub.received, head(hub)
    again = basis("push", merged, "org/name")
    assert (again.exit_code, hub.received, head(hub)) == (0, received, commit)
    assert again.stdout == f"{hub.address}/org/name/commit/{commit}\n"


def test_the_new_model_takes_the_place_of_the_old(hub: Hub, merged: Path, basis: Basis, tmp_path: Path) -> None:
    old = write_checkpoint(tmp_path / "old", make_tensors(5), shards=3)
    others = {"fp16/model.safetensors": b"kept", "notes.md": b"kept", "tool.py": b"kept"}
    hub.add("org/name", files_of(old) | others | {"kv_projection.json": b"{}"})
    result = basis("push", merged, "org/name", "--json")
    shards = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    removed = ["kv_projection.json", *shards, "model.safetensors.index.json"]
    assert sorted(json.loads(result.stdout)["removed"]) == removed
    assert on_hub(hub) == files_of(merged) | others
    assert basis("verify", "org/name").exit_code == 0


def test_an_adapter_and_its_residual_in_one_model(
    hub: Hub, family: dict[str, Path], basis: Basis, tmp_path: Path
) -> None:
    out = tmp_path / "pissa"
    result = basis("init", family["a"], "-r", "2", "-o", out, "--push-to", "org/name")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{out}\n{hub.address}/org/name/commit/{head(hub)}\n"
    card = {"README.md": (out / "adapter" / "README.md").read_bytes()}  # the Hub looks for it at the top
    assert on_hub(hub) == files_of(out) | card
    assert basis("push", out / "residual", "org/residual").exit_code == 0
    assert basis("verify", "org/residual").exit_code == 0


def test_extract_and_expand_push(hub: Hub, family: dict[str, Path], basis: Basis, tmp_path: Path) -> None:
    taken, full = tmp_path / "taken", tmp_path / "full"
    words = ["extract", family["a"], "--base", family["base"], "-r", "2", "-o", taken]
    assert basis(*words, "--push-to", "org/taken", "--json").exit_code == 0
    assert on_hub(hub, "org/taken") == files_of(taken)
    result = basis("expand", "org/taken", "--base", family["base"], "-o", full, "--push-to", "org/full", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["push"]["repo_id"] == "org/full"
    assert on_hub(hub, "org/full") == files_of(full)
    hub.add("org/a", files_of(family["a"]))
    assert basis("init", "org/a", "-r", "2", "-o", tmp_path / "pissa").exit_code == 0
    start = tmp_path / "pissa" / "adapter"
    words = ["expand", start, "--initial", start, "-o", tmp_path / "lora", "--push-to", "org/lora"]
    result = basis(*words)
    assert result.exit_code == 0, result.stderr
    assert "only the structure was checked" in result.stderr  # a plain adapter has no report
    card = card_of(on_hub(hub, "org/lora"))
    assert (card["base_model"], card["base_model_relation"], card["library_name"]) == (["org/a"], "adapter", "peft")


def test_a_gate_that_fails_keeps_the_result_from_the_hub(
    hub: Hub, family: dict[str, Path], basis: Basis, tmp_path: Path
) -> None:
    words = ["merge", family["a"], family["b"], "--base", family["base"], "-m", "ortho", "-o", tmp_path / "out"]
    result = basis(*words, "--fail-if", "models > 1", "--push-to", "org/name")
    assert result.exit_code == 4
    assert "nothing was pushed" in result.stderr
    assert hub.repos == {}
    assert (tmp_path / "out" / "model.safetensors").is_file()


# What is pushed, and what is not --------------------------------------------------------------------------------------


def test_code_that_the_export_wrote_and_no_other(hub: Hub, basis: Basis, tmp_path: Path) -> None:
    model, text = save_model(tmp_path / "m", make_model()), tmp_path / "text.txt"
    text.write_text(make_text(1500))
    quick = ["--calibration", text, "--train-steps", "0", "--length", "32", "--search", "uniform", "--workers", "1"]
    words = ["compress", model, "--kv-ratio", "0.5", *quick, "--export", "remote-code", "-o", tmp_path / "out"]
    result = basis(*words, "--push-to", "org/name", "--fail-if", "cache_kept > 0.5", "--json")
    assert result.exit_code == 0, result.stderr
    code = {"modeling_basis_kv.py", "basis_kv_projection.py"}
    assert {name for name in on_hub(hub) if name.endswith(".py")} == code
    (tmp_path / "out" / "basis_kv_projection.py").write_text("print('changed')")
    (tmp_path / "out" / "tool.py").write_text("print('added')")
    pushed = basiscli.push(tmp_path / "out", "org/other")
    assert pushed.left_out == ["basis_kv_projection.py", "tool.py"]
    assert {name for name in on_hub(hub, "org/other") if name.endswith(".py")} == {"modeling_basis_kv.py"}


def test_only_files_that_belong_to_a_model(hub: Hub, merged: Path, basis: Basis) -> None:
    stray = [".env", ".git/config", "optimizer.pt", "pytorch_model.bin", "modeling.py", "run.sh"]
    for name in stray:
        (merged / name).parent.mkdir(exist_ok=True)
        (merged / name).write_text("secret")
    expected = {name: content for name, content in files_of(merged).items() if name not in stray}
    result = basis("push", merged, "org/name")
    assert f"not pushed: {', '.join(sorted(stray))}\n" in result.stderr
    assert on_hub(hub) == expected


def incomplete(folder: Path) -> Path:
    return folder.rename(folder.with_name("merged.partial"))


def journalled(folder: Path) -> Path:
    (folder / "journal.jsonl").touch()
    return folder


def linked(folder: Path) -> Path:
    (folder / "notes.txt").symlink_to("/etc/hostname")
    return folder


def linked_folder(folder: Path) -> Path:
    (folder / "more").symlink_to("/etc")
    return folder


def damaged(folder: Path) -> Path:
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    return folder


def cut_off(folder: Path) -> Path:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    return folder


def without_weights(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    return folder


REFUSED: dict[str, tuple[Callable[[Path], Path], int, str]] = {
    "interrupted": (incomplete, 2, "the output is not complete"),
    "with a journal": (journalled, 2, "the output is not complete"),
    "no folder": (lambda folder: folder / "model.safetensors", 2, "not a folder"),
    "not there": (lambda folder: folder / "nothing", 2, "not a folder"),
    "a link": (linked, 3, "a link"),
    "a linked folder": (linked_folder, 3, "a link"),
    "other bytes": (damaged, 3, "the tensor is not the one that was written"),
    "cut off": (cut_off, 3, "model.safetensors"),
    "no weights": (without_weights, 3, "no weights here"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_complete_or_not_verified_is_not_pushed(hub: Hub, merged: Path, basis: Basis, reason: str) -> None:
    change, code, what = REFUSED[reason]
    result = basis("push", change(merged), "org/name")
    assert result.exit_code == code, result.stderr
    assert what in result.stderr
    assert hub.repos == {}


@pytest.mark.parametrize("target", ["name", "org/", "/name", "org/name/more", "org name", "org/name@", "https://hub/a"])
def test_a_target_that_is_no_hub_id(hub: Hub, merged: Path, basis: Basis, target: str, tmp_path: Path) -> None:
    assert basis("push", merged, target).exit_code == 2
    late = basis("merge", merged, merged, "-m", "linear", "-o", tmp_path / "out", "--push-to", target)
    assert late.exit_code == 2
    assert not list(tmp_path.glob("out*"))


def test_options_that_do_not_go_together(hub: Hub, merged: Path, basis: Basis, tmp_path: Path) -> None:
    assert basis("push", merged, "org/name@dev", "--create-pr").exit_code == 2
    assert basis("push", merged, "org/name@dev", "--revision", "main").exit_code == 2
    result = basis("merge", merged, merged, "-m", "linear", "-o", tmp_path / "out", "--private")
    assert (result.exit_code, "add --push-to" in result.stderr) == (2, True)
    assert hub.repos == {}


@pytest.mark.parametrize(
    "change, what",
    [
        ({"HF_TOKEN": None}, "cannot push to org/name: nobody is logged in"),
        ({"HF_TOKEN": "hf_wrong"}, "the Hub answered 401 for org/name"),
        ({"HF_HUB_OFFLINE": True}, "cannot push to org/name: HF_HUB_OFFLINE is set"),
    ],
)
def test_a_push_that_could_only_fail_is_refused_before_the_work(
    hub: Hub, merged: Path, basis: Basis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, what: str
) -> None:
    ((name, value),) = change.items()
    if name == "HF_HUB_OFFLINE":
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    elif value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    for words in (["push", merged, "org/name"], ["merge", merged, merged, "-m", "linear", "-o", tmp_path / "out"]):
        result = basis(*words, *(["--push-to", "org/name"] if words[0] == "merge" else []))
        assert result.exit_code == 5
        assert f"error: {what}" in result.stderr
    assert not list(tmp_path.glob("out*"))


# What can go wrong on the way up --------------------------------------------------------------------------------------


def test_an_interrupted_push_sends_only_what_is_missing(hub: Hub, tmp_path: Path) -> None:
    tensors = {f"layer.{n}.weight": torch.rand(2_500_000) for n in range(10)}  # 100 MB in ten files
    model = write_checkpoint(tmp_path / "model", tensors, shards=10)
    shard = max(file.stat().st_size for file in model.glob("*.safetensors"))
    total = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    enough = threading.Event()
    hub.on_upload = lambda: enough.set() if hub.received > 5.5 * shard else None
    words = [sys.executable, "-m", "basiscli", "push", str(model), "org/name", "--progress", "json"]
    env = os.environ | environment(hub, tmp_path)
    pushing = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert enough.wait(60)
    pushing.send_signal(signal.SIGKILL)
    pushing.communicate()
    assert on_hub(hub) == {}  # nothing is seen before the commit
    hub.wait_until_quiet()
    there, first = len(hub.objects), hub.received
    assert there in (5, 6)
    hub.on_upload = lambda: None
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    assert hub.received - first == total - sum(map(len, list(hub.objects.values())[:there]))
    assert hub.received - total <= shard  # of the file that was under way
    assert on_hub(hub) == files_of(model)
    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    uploads = [line for line in lines if line["phase"] == "upload"]
    assert all(line.keys() == {"phase", "done", "total", "unit", "seconds"} for line in uploads)
    assert (uploads[0]["done"], uploads[-1]["done"], uploads[-1]["total"]) == (0, total, total)


PASSING: dict[str, list[Fault]] = {
    "create": [Fault("POST /api/repos/create", status=503)],
    "whoami": [Fault("whoami", status=502), Fault("whoami", cut=0, lost=True)],
    "preupload": [Fault("preupload", status=500), Fault("preupload", lost=True)],
    "batch": [Fault("objects/batch", times=2, status=504)],
    "upload": [Fault(PUT, status=503), Fault(PUT, cut=5000)],
    "verify": [Fault("lfs/verify", status=500)],
    "commit": [Fault("/commit/", times=2, status=503)],
    "commit, answer lost": [Fault("/commit/", lost=True)],
    "silence": [Fault("/commit/", silence=1.0, lost=True)],
}


@pytest.mark.parametrize("where", PASSING)
def test_trouble_that_passes(
    hub: Hub, merged: Path, basis: Basis, waits: list[float], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr("basiscli.hub.errors._SILENCE", 0.5)
    hub.faults = [replace(fault) for fault in PASSING[where]]
    result = basis("push", merged, "org/name")
    assert result.exit_code == 0, result.stderr
    assert all(fault.times == 0 for fault in hub.faults)
    assert waits
    assert on_hub(hub) == files_of(merged)
    assert len(hub.repos["org/name"].commits) == 2  # the first, empty one, and ours, once


def test_a_rate_limit_says_how_long_to_wait(
    hub: Hub, merged: Path, basis: Basis, waits: list[float], tmp_path: Path
) -> None:
    hub.faults = [
        Fault("/commit/", status=429, headers={"Retry-After": "42"}),
        Fault("/commit/", status=429, headers={"RateLimit": '"api";r=0;t=55'}),
    ]
    assert basis("push", merged, "org/name").exit_code == 0
    assert waits == [42.0, 55.0]
    hub.faults = [Fault("GET /api/models", status=429, headers={"Retry-After": "7"})]
    assert resolve("org/name").repo_id == "org/name"
    assert waits == [42.0, 55.0, 7.0]
    hub.faults = [Fault("GET /api/models", times=9, status=429, headers={"Retry-After": "3600"})]
    result = basis("inspect", "org/other", "--json")
    assert json.loads(result.stdout)["what"] == "the Hub answered 429 for org/other"
    assert "too many requests: wait a few minutes" in result.stderr
    assert waits == [42.0, 55.0, 7.0]  # nobody waits for an hour


LASTING: dict[str, tuple[Fault, str]] = {
    "down": (Fault("/commit/", 99, status=503), "the Hub answered 503 for org/name"),
    "no right to make it": (Fault("repos/create", 99, status=403), "the Hub answered 403 for org/name"),
    "upload refused": (Fault(PUT, 99, status=403), "the Hub answered 403 for org/name"),
    "digest": (Fault(PUT, 99, status=400, body=b'{"error": "wrong digest"}'), "400 for org/name: wrong digest"),
    "verification": (Fault("lfs/verify", 99, status=422), "the Hub answered 422 for org/name"),
    "conflict": (Fault("/commit/", 99, status=412), "the Hub answered 412 for org/name"),
    "no JSON": (Fault("preupload", 99, status=200, body=b"<html>"), "could not push to org/name"),
    "connection": (Fault("/commit/", 99, cut=0), "the connection to the Hub was lost"),
}


@pytest.mark.parametrize("where", LASTING)
def test_trouble_that_stays(
    hub: Hub, family: dict[str, Path], basis: Basis, waits: list[float], tmp_path: Path, where: str
) -> None:
    fault, what = LASTING[where]
    hub.faults = [replace(fault)]
    out = tmp_path / "out"
    words = ["merge", family["a"], family["b"], "--base", family["base"], "-m", "ortho", "-o", out]
    result = basis(*words, "--push-to", "org/name", "--json")
    assert result.exit_code == 5, result.stderr
    document = json.loads(result.stdout)
    assert what in document["what"]
    assert document["remedy"].endswith(f"the output is complete: basis push {out} org/name")
    assert document["output"] == str(out)
    assert_no_secret(result.stdout, result.stderr)
    assert not hub.repos or on_hub(hub) == {}
    hub.faults.clear()
    assert basis("push", out, "org/name").exit_code == 0


def test_what_the_library_logs_has_no_signatures(hub: Hub, merged: Path, tmp_path: Path) -> None:
    hub.faults = [Fault(PUT, status=503)]
    done = basis_process("push", merged, "org/name", **environment(hub, tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"{hub.storage}/objects/" in done.stderr
    assert_no_secret(done.stdout, done.stderr)


def test_a_server_without_xet_says_how_to_go_on(hub: Hub, merged: Path, tmp_path: Path) -> None:
    pytest.importorskip("hf_xet")
    done = basis_process("push", merged, "org/name", **environment(hub, tmp_path, HF_HUB_DISABLE_XET="0"))
    assert done.returncode == 5, done.stderr
    assert "HF_HUB_DISABLE_XET=1" in done.stderr
    assert on_hub(hub) == {}


# What can go wrong on the way down ------------------------------------------------------------------------------------


@pytest.fixture
def model(hub: Hub, family: dict[str, Path]) -> dict[str, bytes]:
    """Return the files of a model that the Hub holds as `org/name`."""
    files = files_of(family["a"])
    hub.add("org/name", files)
    return files


def test_a_broken_download_goes_on_where_it_stopped(hub: Hub, model: dict[str, bytes], waits: list[float]) -> None:
    hub.faults = [Fault("GET /objects", cut=5000)]
    folder = resolve("org/name").path
    assert (folder / "model.safetensors").read_bytes() == model["model.safetensors"]
    assert sum(one.startswith("GET /objects") for one in hub.asked) == 2
    assert len(waits) == 1


@pytest.mark.parametrize(
    "fault",
    [
        Fault("GET /api/models", status=503),
        Fault("GET /api/models", lost=True),
        Fault("GET /api/models", silence=1.0, lost=True),
        Fault("HEAD ", status=500),
        Fault("GET /objects", lost=True),
        Fault("GET /objects", damage=True),
        Fault("GET /org/name/resolve/.*/config.json", damage=True),
    ],
)
def test_a_pull_tries_again(
    hub: Hub, model: dict[str, bytes], waits: list[float], monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    monkeypatch.setattr("basiscli.hub.errors._SILENCE", 0.5)
    hub.faults = [fault := replace(fault)]
    assert files_of(resolve("org/name").path) == model
    assert fault.times == 0


DOWN: dict[str, tuple[Fault, str]] = {
    "server": (Fault("GET /api/models", 99, status=503), "the Hub answered 503 for org/name"),
    "token": (
        Fault("GET /api", 99, status=401, headers={"X-Error-Message": "Invalid credentials in Authorization header"}),
        "the Hub answered 401 for org/name",
    ),
    "connection": (Fault("GET /api/models", 99, lost=True), "the connection to the Hub was lost"),
    "download": (Fault("GET /objects", 99, lost=True), "the connection to the Hub was lost"),
    "digest": (Fault("GET /objects", 99, damage=True), "org/name: the bytes of model.safetensors do not have the"),
    "small file": (Fault("GET .*config.json", 99, damage=True), "org/name: the bytes of config.json do not have the"),
}


@pytest.mark.parametrize("where", DOWN)
def test_a_pull_gives_up(
    hub: Hub, model: dict[str, bytes], basis: Basis, waits: list[float], tmp_path: Path, where: str
) -> None:
    fault, what = DOWN[where]
    hub.faults = [replace(fault)]
    result = basis("merge", "org/name", "org/name", "-m", "linear", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 5, result.stderr
    assert what in json.loads(result.stdout)["what"]
    assert not list(tmp_path.glob("out*"))
    assert_no_secret(result.stdout, result.stderr)
    hub.faults.clear()  # and nothing damaged stays in the cache
    assert files_of(resolve("org/name").path) == model


def test_what_answers_is_no_hub(hub: Hub, model: dict[str, bytes], waits: list[float]) -> None:
    hub.faults = [Fault("HEAD ", 99, status=200)]
    with pytest.raises(HubError, match="does not seem to be served by a Hugging Face Hub") as caught:
        resolve("org/name")
    assert caught.value.what.startswith("could not get org/name: ")


def test_gated_private_and_unknown(hub: Hub, family: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/gated", files_of(family["a"]), gated=True)
    hub.add("org/private", files_of(family["a"]), private=True)
    refusals = {
        "org/gated": "org/gated is gated: your account has no access",
        "org/unknown": "there is no model org/unknown on the Hub, or it is private",
        "org/private@nope": "org/private has no revision 'nope'",
    }
    for spec, what in refusals.items():
        with pytest.raises(HubError) as caught:
            resolve(spec)
        assert caught.value.what == what
    with (
        monkeypatch.context() as nobody,
        pytest.raises(HubError, match="there is no model org/private on the Hub, or it is private"),
    ):
        nobody.delenv("HF_TOKEN")
        resolve("org/private")
    assert resolve("org/private").repo_id == "org/private"


def test_a_branch_that_moves_is_recorded_as_the_commit_that_was_read(
    hub: Hub, model: dict[str, bytes], family: dict[str, Path]
) -> None:
    first = resolve("org/name")
    hub.repos["org/name"].commit(files_of(family["b"]))
    hub.objects |= {
        hashlib.sha256(content).hexdigest(): content
        for name, content in files_of(family["b"]).items()
        if name.endswith(".safetensors")
    }
    second, pinned = resolve("org/name"), resolve(f"org/name@{first.revision}")
    assert second.revision == head(hub) != first.revision == pinned.revision
    assert files_of(second.path) == files_of(family["b"])
    assert files_of(pinned.path) == model


# Hostile models -------------------------------------------------------------------------------------------------------

SPRUNG = "import pathlib; pathlib.Path({!r}).touch()\n"


@pytest.fixture
def sprung(tmp_path: Path) -> Path:
    """Return the file that hostile code makes if it is ever run."""
    return tmp_path / "sprung"


def assert_harmless(basis: Basis, tmp_path: Path, sprung: Path, *words: str | Path) -> Result:
    """Run a command that may fail, with a clear message, and that changes nothing but its output and the cache."""
    watched, caches = tmp_path.parent, (tmp_path / "hf", Path(os.environ["BASIS_CACHE"]))
    before = {file: file.stat().st_mtime_ns for file in watched.rglob("*") if file.is_file()}
    result = basis(*words)
    after = {file: file.stat().st_mtime_ns for file in watched.rglob("*") if file.is_file()}
    changed = {file for file in before.keys() | after.keys() if before.get(file) != after.get(file)}
    assert all(any(map(file.is_relative_to, (*caches, tmp_path / "out"))) for file in changed)
    assert not sprung.exists()
    assert result.exit_code in (0, 2, 3, 5), result.stderr
    return result


@pytest.mark.parametrize(
    "name",
    ["../evil.json", "../../../../evil.json", "a/../../evil.json", "/tmp/evil.json", "..\\evil.json", "C:\\evil.json"],
)
def test_a_name_that_leads_out_of_the_model(
    hub: Hub, family: dict[str, Path], basis: Basis, tmp_path: Path, sprung: Path, name: str
) -> None:
    hub.add("org/name", files_of(family["a"]) | {name: b'{"evil": 1}'})
    words = ["merge", "org/name", family["b"], "-m", "linear", "-o", tmp_path / "out"]
    result = assert_harmless(basis, tmp_path, sprung, *words)
    assert result.exit_code == 3
    assert "org/name is refused" in result.stderr
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("shard", ["../b/model.safetensors", "/etc/passwd", "..", "sub/model.safetensors", "a\0b"])
def test_an_index_that_leads_out_of_the_model(
    hub: Hub, family: dict[str, Path], basis: Basis, tmp_path: Path, sprung: Path, shard: str
) -> None:
    files = files_of(family["a"])
    index = {"weight_map": dict.fromkeys(make_tensors(0), shard)}
    hub.add("org/name", files | {"model.safetensors.index.json": json.dumps(index).encode()})
    words = ["merge", "org/name", family["b"], "-m", "linear", "-o", tmp_path / "out"]
    result = assert_harmless(basis, tmp_path, sprung, *words)
    assert result.exit_code == 3
    assert "which is no safetensors file of this folder" in result.stderr
    assert not list(tmp_path.glob("out*"))


def test_code_is_neither_fetched_nor_run_nor_written(hub: Hub, basis: Basis, tmp_path: Path, sprung: Path) -> None:
    model, text = save_model(tmp_path / "model", make_model()), tmp_path / "text.txt"
    text.write_text(make_text(1500))
    config = json.loads((model / "config.json").read_text())
    config |= {"auto_map": {name: f"evil.{name}" for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")}}
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    code = ["evil.py", "setup.py", "__init__.py", "conftest.py", "sub/evil.py", "basis_plugins.py"]
    hub.add(
        "org/name",
        files_of(model)
        | dict.fromkeys(code, SPRUNG.format(str(sprung)).encode())
        | {"config.json": json.dumps(config).encode(), "tokenizer_config.json": json.dumps(tokenizer).encode()},
    )
    out, quick = tmp_path / "out", ["--length", "32"]
    for words in (
        ["inspect", "org/name"], ["verify", "org/name"], ["diff", "org/name", model],
        ["merge", "org/name", model, "-m", "linear", "-o", out],
        ["init", "org/name", "-r", "2", "-o", out / "2"],
        ["eval", "org/name", "--text", text, "--windows", "1", *quick],
        ["compress", "org/name", "--kv-ratio", "0.5", "--calibration", text, "--train-steps", "0", "--search",
         "uniform", "--workers", "1", "-o", out / "3", *quick],
    ):  # fmt: skip
        assert_harmless(basis, tmp_path, sprung, *words)
    assert not [one for one in hub.asked if one.endswith(".py")]
    assert not list(out.rglob("*.py"))


def test_more_json_than_a_model_has(
    hub: Hub, family: dict[str, Path], basis: Basis, tmp_path: Path, sprung: Path
) -> None:
    deep = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    for name in ("config.json", "adapter_config.json", "model.safetensors.index.json", "basis_report.json"):
        hub.add(f"org/{name[:5]}", files_of(family["a"]) | {name: deep})
        words = ["merge", f"org/{name[:5]}", family["b"], "-m", "linear", "-o", tmp_path / "out"]
        assert_harmless(basis, tmp_path, sprung, *words)
    with (family["a"] / "config.json").open("r+b") as file:
        file.truncate(300_000_000)  # a hole: takes no room
    result = basis("inspect", family["a"])
    assert result.exit_code == 3
    assert "more than 200 MB of JSON" in result.stderr


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "LICENSE", "1_Pooling/config.json", "1_Pooling"]
)
def test_a_clone_with_links_to_our_files(family: dict[str, Path], basis: Basis, tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret" / "config.json"
    secret.parent.mkdir()
    secret.write_text('{"auths": "S3cret"}')
    model = family["a"]
    (model / "modules.json").write_text('[{"path": "1_Pooling"}]')
    link = model / name
    if name == "1_Pooling/config.json":
        link.parent.mkdir()
    link.unlink(missing_ok=True)
    link.symlink_to(secret.parent if name == "1_Pooling" else secret)
    result = basis("merge", model, model, "-m", "linear", "-o", tmp_path / "out")
    written = snapshot(tmp_path / "out") if result.exit_code == 0 else {}
    assert not any(b"S3cret" in content for content in written.values())
    if name != "1_Pooling":  # a folder that is a link is no folder of the model
        assert result.exit_code == 3
        assert "a link that leads out of the folder" in result.stderr


# Model cards ----------------------------------------------------------------------------------------------------------


def card_of(files: dict[str, bytes], name: str = "README.md") -> dict[str, Any]:
    table: dict[str, Any] = yaml.safe_load(files[name].decode().split("---")[1])
    return table


def test_cards_say_where_a_model_comes_from(hub: Hub, family: dict[str, Path], tmp_path: Path, basis: Basis) -> None:
    for name, word in {"base": "mit", "a": "apache-2.0", "b": "mit"}.items():
        card = f"---\nlicense: {word}\nbase_model: org/base\n---\n" if name != "base" else "---\nlicense: mit\n---\n"
        hub.add(f"org/{name}", files_of(family[name]) | {"README.md": card.encode()})
    made = {"merge": ["merge", "org/a", "org/b", "-m", "ortho"], "extract": ["extract", "org/a", "--base", "org/base"]}
    made |= {"init": ["init", "org/b", "-r", "2"]}
    for command, words in made.items():
        result = basis(*words, "-o", tmp_path / command, "--push-to", f"org/{command}")
        assert result.exit_code == 0, result.stderr
        assert ("different licences" in result.stderr) is (command != "init")
    cards = {command: card_of(on_hub(hub, f"org/{command}")) for command in made}
    relations = [(cards[one]["base_model_relation"], cards[one]["library_name"], cards[one]["license"]) for one in made]
    assert relations == [("merge", "transformers", "other"), ("adapter", "peft", "other"), ("adapter", "peft", "mit")]
    assert cards["merge"]["base_model"] == ["org/a", "org/base", "org/b"]
    assert cards["extract"]["base_model"] == ["org/base"]
    assert cards["init"]["base_model"] == ["org/b"]
    assert all(
        {"basis", method} <= set(cards[c]["tags"])
        for c, method in zip(made, ("ortho", "extract", "pissa"), strict=True)
    )


# CI -------------------------------------------------------------------------------------------------------------------

CI = Path(__file__).parents[1] / "examples" / "ci"


@pytest.fixture
def ci(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """Return the environment of a CI job: a base and two fine-tunes on the Hub, and a held-out text."""
    (tmp_path / "held-out.txt").write_text(make_text(3000))
    base = make_model()
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        if seed:
            for parameter in base.parameters():
                parameter.data += 0.001 * torch.randn_like(parameter)
        hub.add(f"org/{name}", files_of(save_model(tmp_path / name, base)))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    words = {"BASE": "org/base", "MODELS": "org/a@main org/b@main", "TEXT": "held-out.txt", "TARGET": "org/merged"}
    return os.environ | environment(hub, tmp_path) | words | {"PATH": path}


def bash(script: str, env: dict[str, str], home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-e", "-c", script], env=env, cwd=home, capture_output=True, text=True, check=False)


def test_the_shell_script_merges_measures_and_pushes(hub: Hub, ci: dict[str, str], tmp_path: Path) -> None:
    script = str(CI / "merge-and-push.sh")
    refused = bash(script, ci | {"GATES": "agreement < 0\nperplexity > 1", "OUT": "first"}, tmp_path)
    assert refused.returncode == 4, refused.stderr
    assert "failed: gate 'perplexity > 1': perplexity = " in refused.stderr
    assert "org/merged" not in hub.repos
    assert [gate["failed"] for gate in json.loads((tmp_path / "eval.json").read_text())["gates"]] == [False, True]
    done = bash(script, ci, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{hub.address}/org/merged/commit/{head(hub, 'org/merged')}\n"
    assert on_hub(hub, "org/merged") == files_of(tmp_path / "merged")
    assert_no_secret(done.stdout, done.stderr, *on_hub(hub, "org/merged").values())


def test_the_workflow_does_the_same(hub: Hub, ci: dict[str, str], tmp_path: Path) -> None:
    job = yaml.safe_load((CI / "merge-and-push.yml").read_text())["jobs"]["merge"]
    assert job["env"]["HF_TOKEN"] == "${{ secrets.HF_TOKEN }}"  # and in no command
    steps = [step["run"] for step in job["steps"] if step.get("run", "").startswith("basis ")]
    assert [step.split()[1] for step in steps] == ["merge", "eval", "push"]
    for step in steps:
        done = bash(step, ci, tmp_path)
        assert done.returncode == 0, done.stderr
    assert done.stdout == f"{hub.address}/org/merged/discussions/1\n"
    assert (
        hub.repos["org/merged"].files("refs/pr/1").keys() - {".gitattributes"} == files_of(tmp_path / "merged").keys()
    )
