"""What the tests share: small checkpoints made on the spot, and ways to run the command line."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer import testing
from typer.main import get_command
from typer.testing import CliRunner, Result

from basiscli.app import app
from tests.forked import Forked, can_fork, different

if TYPE_CHECKING:
    from tests.hub_server import Hub

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True}

Tensors = dict[str, Tensor]

testing._get_command = cache(get_command)  # or every run builds all commands anew, longer than most of them take


TOGETHER = {
    "ray": ("tests/engine/test_ray.py", "tests/engine/test_ray_calibration.py"),
    "memory": (
        "tests/real/",
        "tests/checkpoints/test_adapter.py::test_a_merge_of_adapters_never_holds_a_dense_tensor",
        "tests/cli/test_init.py::test_a_model_is_never_in_memory",
        "tests/cli/test_init.py::test_no_more_than_a_layer_is_in_memory",
    ),
}
"""Tests of which one is run at a time: no two clusters, and no two large models or measurements, fill the machine."""


def group_of(test: str) -> str:
    """Return what a test runs in one process with: its file, if nothing else."""
    return next((name for name, starts in TOGETHER.items() if test.startswith(starts)), test.partition("::")[0])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let what takes long begin first, or all processes but one would wait for it."""
    items.sort(key=lambda item: [*TOGETHER, group_of(item.nodeid)].index(group_of(item.nodeid)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand out tests by groups; not by xdist's own marks, which pytest 9.2 does not let it pass on."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False
    return Groups(config, log)


@pytest.fixture(autouse=True)
def _no_variable_stays() -> Iterator[None]:
    """Take away the variables that libraries set as they work (torch does as it compiles): the next test knows none."""
    before = set(os.environ)
    yield
    for name in different(os.environ) - before:
        os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep every test's conversions, and everything it might ask the Hub for, to itself."""
    cache = tmp_path_factory.getbasetemp() / "basis-cache"
    cache.mkdir(exist_ok=True)
    monkeypatch.setenv("BASIS_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield
    shutil.rmtree(cache, ignore_errors=True)


def make_tensors(seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensors:
    """Return the tensors of a tiny Llama-like model with every kind of shape a merge must handle."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    return {
        "model.embed_tokens.weight": normal(50, 24),
        "model.layers.0.self_attn.q_proj.weight": normal(24, 24),
        "model.layers.0.self_attn.q_proj.bias": normal(24),
        "model.layers.0.mlp.up_proj.weight": normal(40, 24),
        "model.layers.0.mlp.down_proj.weight": normal(24, 40),
        "model.layers.0.input_layernorm.weight": normal(24),
        "model.layers.10.conv.weight": normal(8, 4, 3),
        "model.layers.2.empty.weight": normal(0, 24),
        "model.scalar": normal(),
        "model.norm.weight": normal(24),
    }


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    shards: int = 1,
    *,
    card: str | None = None,
) -> Path:
    """Write a checkpoint as other tools do, with the safetensors library; shards get their tensors in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config or LLAMA)))
    (folder / "tokenizer.json").write_text("{}")
    if card is not None:
        (folder / "README.md").write_text(card)
    names = sorted(tensors)
    if shards == 1:
        save_file({name: tensors[name].contiguous() for name in names}, folder / "model.safetensors", {"format": "pt"})
        return folder
    where = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name].contiguous() for name in names[shard::shards]}
        save_file(part, folder / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def read_checkpoint(folder: Path) -> Tensors:
    """Read a checkpoint with the safetensors library, following its index."""
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def add(base: Mapping[str, Tensor], delta: Mapping[str, Tensor], factor: float = 0.05) -> Tensors:
    """Return a fine-tune: base plus a small change, in the base's dtypes."""
    return {name: (t.float() + factor * delta[name].float()).to(t.dtype) for name, t in base.items()}


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Path]:
    """Return a base and three fine-tunes on disk, as folders `base`, `a`, `b` and `c`."""
    base = make_tensors(0)
    folders = {"base": write_checkpoint(tmp_path / "base", base)}
    for seed, name in enumerate("abc", start=1):
        folders[name] = write_checkpoint(tmp_path / name, add(base, make_tensors(seed)))
    return folders


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Return a Hub that huggingface_hub talks to in this process, with an empty cache and somebody logged in."""
    from huggingface_hub import close_session, constants

    from tests.hub_server import TOKEN, running_hub

    with running_hub() as hub:
        settings = {
            "ENDPOINT": hub.address, "HF_HUB_CACHE": str(tmp_path / "hf" / "hub"), "HF_HUB_DISABLE_XET": True,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.address + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_TOKEN_PATH": str(tmp_path / "hf" / "token"), "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_PROGRESS_BARS": True,
        }  # fmt: skip
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub
        close_session()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the pauses between tries, which take no time."""
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


@pytest.fixture
def basis() -> Callable[..., Result]:
    """Return a function that runs the command line in this process."""
    runner = CliRunner()

    def run(*words: str | Path) -> Result:
        return runner.invoke(app, [str(word) for word in words])

    return run


def python_process(*arguments: str, cwd: Path | None = None, **env: str) -> Forked | subprocess.Popen[str]:
    """Start a Python with these arguments, as a fork of one that has the imports where that is the same."""
    if can_fork(os.environ | env):
        return Forked([*arguments], cwd, os.environ | env)
    return new_interpreter(*arguments, cwd=cwd, **env)


def new_interpreter(*arguments: str, cwd: Path | None = None, **env: str) -> subprocess.Popen[str]:
    """Start a Python with these arguments."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=cwd, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def basis_process(
    *words: str | Path, cwd: Path | None = None, new: bool = False, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own; a `new` interpreter has its own hash seed, and only its memory.

    A fork's peak memory counts what it inherits: of two forks it says what one takes more than the other.
    """
    start = new_interpreter if new else python_process
    process = start("-m", "basiscli", *map(str, words), cwd=cwd, **env)
    printed, said = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode or 0, printed, said)


def stop_after(patch: pytest.MonkeyPatch, owner: type, name: str, calls: int) -> None:
    """Let a method be interrupted, as by Ctrl-C, after it worked so many times."""
    real, left = getattr(owner, name), [calls]

    def stop(self: Any, *words: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(self, *words, **options)

    patch.setattr(owner, name, stop)


@contextmanager
def full_disk(call: str, after: int) -> Iterator[list[int]]:
    """Let a call of the system fail for lack of space after it worked so many times; yield a list of one a call."""
    real, seen = getattr(os, call), list[int]()

    def fail(*words: Any) -> Any:
        seen.append(1)
        if len(seen) > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"basiscli.checkpoints.writer.os.{call}", fail)
        yield seen


def snapshot(*folders: Path) -> dict[str, bytes]:
    """Return every file under some folders, to see that nothing touched them."""
    return {str(f): f.read_bytes() for folder in folders for f in sorted(folder.rglob("*")) if f.is_file()}
