"""Adapters of a large checkpoint within 2 GB of memory: `python benchmarks/init_memory.py --gigabytes 13.5` (Linux).

Makes a random Llama in bfloat16, writing it in blocks of rows, and runs `basis init` on it in a process that may hold
no more private writable memory (RLIMIT_DATA: heap and anonymous mappings) than it held after its imports, and 2 GB.
Libraries and files that are mapped do not count there: the kernel takes such pages back when it wants them. Threads'
stacks would, so they are allowed for. Beyond the limit an allocation fails, and the benchmark with it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import CACHE

if TYPE_CHECKING:
    import torch

RESULTS = Path(__file__).parent / "results" / "init_memory.json"
VOCABULARY = 32_000
FFN = {4096: 11_008, 3072: 8_192, 2048: 5_632, 1024: 2_816}
LEAST_LAYERS = 8
SHARD_BYTES = 2_000_000_000
SPIKES = 64  # singular values above those of the noise, as trained weights have
ROWS = 1024
IMPORTS = ("torch", "transformers.models.llama.modeling_llama", "accelerate", "basiscli.commands.init.api")
INTERVAL = 0.02


def layer_shapes(hidden: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of one Llama layer."""
    ffn = FFN[hidden]
    attention = {f"self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
    mlp = {"mlp.gate_proj.weight": (ffn, hidden), "mlp.up_proj.weight": (ffn, hidden)}
    norms = {f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return {**attention, **mlp, "mlp.down_proj.weight": (hidden, ffn), **norms}


def nbytes(shape: tuple[int, ...]) -> int:
    """Return the size of a bfloat16 tensor."""
    return 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)


def plan(gigabytes: float, width: int) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Return the config and the tensors of a Llama of about that size; width 0: as wide as leaves it eight layers."""
    for hidden in [width] if width else FFN:
        layer = sum(map(nbytes, layer_shapes(hidden).values()))
        layers = round((gigabytes * 1e9 - 2 * nbytes((VOCABULARY, hidden))) / layer)
        if layers >= (1 if width else LEAST_LAYERS):
            break
    else:
        raise SystemExit("so few bytes make no layer of that width")
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for place in range(layers):
        shapes |= {f"model.layers.{place}.{name}": shape for name, shape in layer_shapes(hidden).items()}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (VOCABULARY, hidden)}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": FFN[hidden],
        "max_position_embeddings": 4096,
        "num_attention_heads": hidden // 128,
        "num_hidden_layers": layers,
        "num_key_value_heads": hidden // 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "vocab_size": VOCABULARY,
    }
    return config, shapes


def blocks(shape: tuple[int, ...], generator: torch.Generator) -> Iterator[bytes]:
    """Yield a random tensor in blocks of rows: noise and, in a matrix, falling singular values above it."""
    import torch

    if len(shape) == 1:
        yield torch.ones(shape, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
        return
    rows, columns = shape
    edge = 0.02 * (rows**0.5 + columns**0.5)  # the noise's largest singular value
    values = 8 * edge * torch.arange(1, SPIKES + 1) ** -0.5
    right = values[:, None] * torch.randn(SPIKES, columns, generator=generator) / columns**0.5
    for start in range(0, rows, ROWS):
        count = min(ROWS, rows - start)
        left = torch.randn(count, SPIKES, generator=generator) / rows**0.5
        block = torch.addmm(0.02 * torch.randn(count, columns, generator=generator), left, right)
        yield block.bfloat16().view(torch.uint8).numpy().tobytes()


def write_model(folder: Path, gigabytes: float, width: int) -> None:
    """Write config, shards and index, and tokens to calibrate on."""
    import torch
    from safetensors.torch import save_file

    config, shapes = plan(gigabytes, width)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if sum(map(nbytes, shards[-1].values())) + nbytes(shape) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    generator = torch.Generator().manual_seed(0)
    where = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        header, end = {}, 0
        for name, shape in shard.items():
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end := end + nbytes(shape)]}
            where[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for shape in shard.values():
                stream.writelines(blocks(shape, generator))
    total = sum(map(nbytes, shapes.values()))
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tokens = torch.randint(VOCABULARY, (16, 256), generator=generator)
    save_file({"input_ids": tokens}, folder / "tokens.safetensors")


def status(process: int | str) -> dict[str, int]:
    """Return what the kernel says of a process's memory, in bytes."""
    text = Path(f"/proc/{process}/status").read_text()
    return {name: 1024 * int(size) for name, size in re.findall(r"(\w+):\s+(\d+) kB", text)}


def limited(budget: int, file: Path, words: list[str]) -> None:
    """Import what a run needs, limit what it may take beyond, note both and be `basis`."""
    import resource

    for name in IMPORTS:
        __import__(name)
    threads = 4 * (os.cpu_count() or 1)
    stack = max(resource.getrlimit(resource.RLIMIT_STACK)[0], 1 << 23)
    now = status("self")
    limit = now["VmData"] + budget + threads * stack
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    file.write_text(json.dumps({"data": now["VmData"], "resident": now["VmRSS"], "limit": limit}))
    sys.argv = ["basis", *words]
    runpy.run_module("basiscli", run_name="__main__")


def run(budget: int, words: list[str]) -> dict[str, float]:
    """Run `basis` limited; return its time and the peaks of its memory, those beyond its imports too."""
    start, log = CACHE / "memory-start.json", CACHE / "memory.log"
    start.unlink(missing_ok=True)
    command = [sys.executable, __file__, "limited", str(budget), str(start), *words]
    peaks: dict[str, int] = {}

    def sample(process: int) -> None:
        while not ended.wait(INTERVAL):
            try:
                for name, size in status(process).items():
                    peaks[name] = max(peaks.get(name, 0), size)
            except (FileNotFoundError, ProcessLookupError):
                return

    ended = threading.Event()
    with log.open("w") as stream:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
        sampler = threading.Thread(target=sample, args=(process.pid,))
        sampler.start()
        _, code, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(code)
        ended.set()
        sampler.join()
    if process.returncode:
        raise SystemExit(f"failed within {budget / 1e9:g} GB: basis {' '.join(words)}\n{log.read_text()}")
    before = json.loads(start.read_text())
    return {
        "seconds": round(seconds, 1),
        "peak_resident_gb": round(usage.ru_maxrss * 1024 / 1e9, 3),
        "resident_beyond_imports_gb": round((usage.ru_maxrss * 1024 - before["resident"]) / 1e9, 3),
        "private_beyond_imports_gb": round((peaks["VmData"] - before["data"]) / 1e9, 3),
        "limit_beyond_imports_gb": round((before["limit"] - before["data"]) / 1e9, 3),
    }


def main() -> None:
    """Make the model, run the methods, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=13.5, help="13.5 is Llama-2-7B's shape")
    parser.add_argument("--width", type=int, choices=list(FFN), default=0, help="by default as its size allows")
    parser.add_argument("--budget", type=float, default=2.0, help="GB beyond the imports")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--methods", nargs="+", default=["pissa", "eva"], choices=["pissa", "eva"])
    args = parser.parse_args()

    CACHE.mkdir(parents=True, exist_ok=True)
    model, out = CACHE / f"llama-{args.gigabytes:g}gb-{args.width}", CACHE / "memory-out"
    if not (model / "tokens.safetensors").is_file():
        shutil.rmtree(model, ignore_errors=True)
        subprocess.run([sys.executable, __file__, "make", model, str(args.gigabytes), str(args.width)], check=True)
    config = json.loads((model / "config.json").read_text())
    size = sum(f.stat().st_size for f in model.glob("*.safetensors")) / 1e9
    print(f"{size:.2f} GB in bfloat16: {config['num_hidden_layers']} layers, {config['hidden_size']} wide\n")
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    table = results.setdefault(f"{size:.1f} GB, {config['hidden_size']} wide", {})
    table |= {"gigabytes": round(size, 2), "layers": config["num_hidden_layers"], "rank": args.rank}
    for method in args.methods:
        words = ["init", str(model), "--method", method, "--rank", str(args.rank), "-o", str(out), "--overwrite", "-q"]
        words += ["--calibration", str(model / "tokens.safetensors")] if method == "eva" else []
        table[method] = run(round(args.budget * 1e9), words)
        shutil.rmtree(out)
        print(f"{method}: " + ", ".join(f"{name} {value:g}" for name, value in table[method].items()), flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    shutil.rmtree(model)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["make", folder, gigabytes, width]:
            write_model(Path(folder), float(gigabytes), int(width))
        case ["limited", budget, file, *words]:
            limited(int(budget), Path(file), words)
        case _:
            main()
