"""What a GPU does, in one call of under ten minutes: `python benchmarks/gpu.py -o results/gpu.json`.

A random bfloat16 checkpoint of Llama-2-7B's shapes and fine-tunes of it, held in the machine's memory (`/dev/shm`):
merges and initialisations against the bandwidth of copies and the rate of matrix products, both measured first, and
decoding with a whole KV cache and with 40 % of it. With `--layers` less than 32, models of that many layers are
measured, and the times of 32 said beside them. `--shape tiny --device cpu` runs all of it anywhere, to see that it
does. What fails is noted with its traceback, and the rest goes on; the file of results is written anew after each
measurement, so that a run that is stopped leaves what it had.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import basiscli
from basiscli.checkpoints.header import TensorSpec
from basiscli.checkpoints.scratch import write_file
from basiscli.engine.pricing import (
    exact_svd_flops,
    fast_svd_flops,
    projection_flops,
)
from basiscli.runtime.caches import given_cache
from basiscli.runtime.kv_projection import KVProjection, attach

MODELS = ("base", "a", "b", "c")
RANK, WINDOWS = 16, 8
KEPT = 0.4  # of the KV cache: ratio 0.6
CONTEXTS, BATCHES = (4096, 16_384, 65_536), (1, 8, 32)
STEPS = 12
PARTS = ("commands", "decoding", "eigenvectors")


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama."""

    hidden: int
    inner: int
    heads: int
    layers: int
    vocabulary: int

    def config(self, layers: int) -> dict[str, Any]:
        """Return what goes into config.json."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": self.hidden,
            "intermediate_size": self.inner, "num_attention_heads": self.heads, "num_key_value_heads": self.heads,
            "num_hidden_layers": layers, "vocab_size": self.vocabulary, "tie_word_embeddings": False,
            "max_position_embeddings": max(CONTEXTS) + STEPS + 8, "dtype": "bfloat16",
        }  # fmt: skip

    def linear(self) -> dict[str, tuple[int, int]]:
        """Return the linear weights of a layer by name."""
        h, i = self.hidden, self.inner
        attention = {f"self_attn.{p}_proj": (h, h) for p in "qkvo"}
        return attention | {"mlp.gate_proj": (i, h), "mlp.up_proj": (i, h), "mlp.down_proj": (h, i)}

    def tensors(self, layers: int) -> list[TensorSpec]:
        """Return all tensors of a model."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (self.vocabulary, self.hidden)}
        for number in range(layers):
            norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (self.hidden,))
            shapes |= {f"model.layers.{number}.{name}": s for name, s in {**self.linear(), **norms}.items()}
        shapes |= {"model.norm": (self.hidden,), "lm_head": (self.vocabulary, self.hidden)}
        return [TensorSpec(f"{name}.weight", "BF16", shape) for name, shape in shapes.items()]


SIDES, TOGETHER = (256, 576, 1024, 2048, 4096), (1, 4, 16)  # of symmetric matrices, and how many at a time
SHAPES = {"7B": Shape(4096, 11_008, 32, 32, 32_000), "tiny": Shape(64, 96, 4, 2, 128)}


class Bench:
    """One run of everything: the machine, the models, and the table of what was measured."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.shape: Shape = SHAPES[args.shape]
        self.device = torch.device(args.device)
        self.work = work
        self.deadline = time.monotonic() + args.seconds
        self.layers = min(args.layers, self.shape.layers, self._fitting())
        self.output: Path = args.output
        self.rows: list[dict[str, Any]] = []
        self.eigenvectors: list[dict[str, Any]] = []
        self.decoded: list[dict[str, Any]] = []
        self.failures: dict[str, str] = {}
        self.peaks: dict[str, float] = {}

    def _fitting(self) -> int:
        """Return how many layers fit the memory file system: four models, an output, and float32 scratch."""
        layer = 2 * sum(map(prod, self.shape.linear().values()))
        ends = 4 * self.shape.vocabulary * self.shape.hidden
        return max(1, int((0.85 * shutil.disk_usage(self.work).free - 7 * ends) / (7 * layer)))

    @property
    def to_whole(self) -> float:
        """What multiplies a time to be that of all layers."""
        return self.shape.layers / self.layers

    @property
    def length(self) -> int:
        """Return the tokens of a window of text."""
        return 2048 if self.shape.hidden > 64 else 64

    def wait(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def timed(self, do: Callable[[], Any]) -> float:
        """Return the seconds that something takes, the device's work included."""
        self.wait()
        started = time.perf_counter()
        do()
        self.wait()
        return time.perf_counter() - started

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.deadline - time.monotonic()

    def attempt(self, what: str, do: Callable[[], Any]) -> Any:
        """Do one measurement; note how it failed, and write down what is known by now."""
        try:
            return do()
        except Exception as error:
            self.failures[what] = traceback.format_exc()
            print(f"| {what} | FAILED: {type(error).__name__}: {str(error).splitlines()[0][:200]} |", flush=True)
            return None
        finally:
            self.save()

    def save(self) -> None:
        """Write what was measured so far."""
        result = {
            "machine": machine(self.device), "peaks": self.peaks, "eigenvectors": self.eigenvectors,
            "commands": self.rows, "decoding": self.decoded, "failures": self.failures,
        }  # fmt: skip
        self.output.write_text(json.dumps(result, indent=1) + "\n")

    # Peaks ------------------------------------------------------------------------------------------------------------

    def measure_peaks(self) -> None:
        """Measure copies and matrix products on their own."""
        gpu = self.device.type == "cuda"
        size = 1 << (28 if gpu else 22)
        pinned = torch.empty(size, dtype=torch.uint8, pin_memory=gpu)
        there = torch.empty(size, dtype=torch.uint8, device=self.device)
        other = torch.empty_like(there)
        self.peaks["to the device, GB/s"] = size / self._least(lambda: there.copy_(pinned, non_blocking=True)) / 1e9
        self.peaks["from the device, GB/s"] = size / self._least(lambda: pinned.copy_(there, non_blocking=True)) / 1e9
        self.peaks["on the device, GB/s read and written"] = 2 * size / self._least(lambda: other.copy_(there)) / 1e9
        torch.set_float32_matmul_precision("highest")
        side = 8192 if gpu else 256
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            square = torch.randn(side, side, device=self.device, dtype=dtype)
            rate = 2 * side**3 / self._least(lambda one=square: one @ one) / 1e12
            self.peaks[f"products, {str(dtype).removeprefix('torch.')}, TFLOP/s"] = rate
        for name, rate in self.peaks.items():
            print(f"| {name} | {rate:.4g} |", flush=True)

    def _least(self, do: Callable[[], Any]) -> float:
        do()
        return min(self.timed(do) for _ in range(5))

    def measure_batches(self) -> None:
        """Time the eigenvectors of a matrix alone and in batches: what `engine.batches` rests on."""
        for side in SIDES if self.shape.hidden > 64 else (16,):
            noise = torch.randn(max(TOGETHER), side, side, device=self.device, dtype=torch.float64)
            grams = noise @ noise.mT
            times: dict[str, float] = {}
            for count in TOGETHER:
                expected = count * min(times.values(), default=0.0)
                if expected > 5 or self.left() < 30:
                    break
                torch.linalg.eigh(grams[:count])
                times[str(count)] = self.timed(lambda n=count, g=grams: torch.linalg.eigh(g[:n])) / count
            self.eigenvectors.append({"side": side, "seconds_each": times})
            cells = [f"{1000 * times[str(count)]:.1f} ms" if str(count) in times else "–" for count in TOGETHER]
            print(f"| {side} | {' | '.join(cells)} |", flush=True)
            del noise, grams

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def make_models(self) -> None:
        """Write the base and three fine-tunes: the base moved by a tenth of its size."""

        def data(seed: int) -> Iterator[Tensor]:
            for place, spec in enumerate(specs):
                own = torch.Generator(self.device).manual_seed(place)
                values = torch.randn(spec.shape, generator=own, device=self.device) * 0.02
                if seed:
                    own.manual_seed(place + seed * len(specs))
                    values += torch.randn(spec.shape, generator=own, device=self.device) * 0.002
                yield values.bfloat16()

        def make(number: int) -> None:
            folder = self.work / MODELS[number]
            folder.mkdir()
            write_file(folder / "model.safetensors", specs, data(number))
            (folder / "config.json").write_text(json.dumps(self.shape.config(self.layers)))

        specs = self.shape.tensors(self.layers)
        with ThreadPoolExecutor(len(MODELS)) as pool:
            list(pool.map(make, range(len(MODELS))))
        ids = torch.randint(self.shape.vocabulary, (WINDOWS, self.length), generator=torch.Generator())
        save_file({"input_ids": ids}, self.work / "tokens.safetensors")

    def models(self) -> None:
        """Make the models, and say how long that takes."""
        print(f"| making the models | {self.timed(self.make_models):.1f} s | | | | | |", flush=True)

    # Commands ---------------------------------------------------------------------------------------------------------

    def merges(self) -> None:
        """Merge three fine-tunes by three methods."""
        models = [self.work / name for name in MODELS[1:]]
        size = (self.work / "base" / "model.safetensors").stat().st_size
        for method, based in (("linear", False), ("ties", True), ("ortho", True)):
            base = {"base": self.work / "base"} if based else {}
            passes = 2 if method == "ortho" else 1
            moved = size * (passes * (3 + based) + 1 + (4 if method == "ortho" else 0))
            flops = self._flops(lambda shape: 2 * projection_flops(shape)) if method == "ortho" else 0.0
            self._command(
                f"merge {method}, three" + (" and a base" if based else ""), moved, flops, "float64",
                lambda out, m=method, b=base: basiscli.merge(
                    models, method=m, output=out, device=self.device.type, **b
                ),
            )  # fmt: skip

    def inits(self) -> None:
        """Initialise adapters from the weights and from text."""
        base = self.work / "base"
        size = (base / "model.safetensors").stat().st_size
        for exact, name in ((False, "pissa"), (True, "pissa --exact")):
            cost, dtype = (exact_svd_flops, "float64") if exact else (fast_svd_flops, "float32")
            self._command(
                f"init {name}", 2 * size, self._flops(lambda shape, cost=cost: cost(shape, RANK)), dtype,
                lambda out, e=exact: basiscli.init(
                    base, method="pissa", rank=RANK, exact=e, output=out, device=self.device.type
                ),
            )  # fmt: skip
        tokens, count = self.work / "tokens.safetensors", WINDOWS * self.length
        parameters = self.layers * sum(map(prod, self.shape.linear().values()))
        self._command(
            f"init eva, {count} tokens", size, 2.0 * count * parameters, "bfloat16",
            lambda out: basiscli.init(
                base, method="eva", rank=RANK, calibration=tokens, tokens=count, output=out, device=self.device.type
            ),
        )  # fmt: skip

    def _flops(self, cost: Callable[[tuple[int, int]], float]) -> float:
        return self.layers * sum(cost(shape) for shape in self.shape.linear().values())

    def _command(self, what: str, moved: float, flops: float, dtype: str, do: Callable[[Path], Any]) -> None:
        self.attempt(what, lambda: self._measure_command(what, moved, flops, dtype, do))
        for left in self.work.glob("out*"):
            shutil.rmtree(left)

    def _measure_command(self, what: str, moved: float, flops: float, dtype: str, do: Callable[[Path], Any]) -> None:
        if self.left() < 30:
            print(f"| {what} | no time left |", flush=True)
            return
        out = self.work / "out"
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = self.timed(lambda: do(out))
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        copies = moved / seconds / 1e9 / self.peaks["to the device, GB/s"]
        products = flops / seconds / 1e12 / self.peaks[f"products, {dtype}, TFLOP/s"] if flops else None
        self.rows.append(
            {
                "what": what, "layers": self.layers, "seconds": seconds, "seconds_all_layers": seconds * self.to_whole,
                "gb_per_s": moved / seconds / 1e9, "of_copies": copies, "of_products": products, "dtype": dtype,
                "device_peak_gb": peak / 1e9,
            }
        )  # fmt: skip
        share = "–" if products is None else f"{products:.1%} of {dtype}"
        print(
            f"| {what} | {seconds:.1f} s | {seconds * self.to_whole:.0f} s | {moved / seconds / 1e9:.1f} GB/s | "
            f"{copies:.1%} | {share} | {peak / 1e9:.1f} GB |",
            flush=True,
        )

    # Decoding ---------------------------------------------------------------------------------------------------------

    def decoding(self) -> None:
        """Time decoding steps after contexts that are random numbers in the cache: no prompt has to be read."""
        config = {k: v for k, v in self.shape.config(self.shape.layers).items() if k != "model_type"}
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(self.device):
            dense, small = (LlamaForCausalLM(LlamaConfig(**config)).eval() for _ in range(2))
        torch.set_default_dtype(torch.float32)
        small.load_state_dict(dense.state_dict(), assign=True)
        heads, dim = self.shape.heads, self.shape.hidden // self.shape.heads
        rank = round(KEPT * dim)
        bases = torch.linalg.qr(torch.randn(heads, dim, dim))[0]
        attach(small, [KVProjection(bases, bases, [rank] * heads, [rank] * heads) for _ in range(self.shape.layers)])
        for context in CONTEXTS if self.shape.hidden > 64 else (64,):
            for batch in BATCHES:
                whole = 4 * batch * context * self.shape.hidden * self.shape.layers
                if self.device.type == "cuda" and 1.3 * whole > torch.cuda.mem_get_info()[0]:
                    continue
                if self.left() < 20:
                    return
                rates = [
                    batch / self._step(model, batch, context, shape)
                    for model, shape in ((dense, (heads, dim)), (small, (1, heads * rank)))
                ]
                self.decoded.append({"context": context, "batch": batch, "dense": rates[0], "kv0.6": rates[1]})
                print(
                    f"| {context} | {batch} | {whole / 1e9:.1f} GB | {rates[0]:.1f} | {rates[1]:.1f} | "
                    f"{rates[1] / rates[0]:.2f} |",
                    flush=True,
                )
                self.save()

    @torch.inference_mode()
    def _step(self, model: Any, batch: int, context: int, shape: tuple[int, int]) -> float:
        """Return the median time of a step."""
        cache = DynamicCache(config=model.config)
        for layer in range(self.shape.layers):
            keys, values = (
                torch.randn(batch, shape[0], context, shape[1], dtype=torch.bfloat16, device=self.device)
                for _ in range(2)
            )
            cache.update(keys, values, layer)
            del keys, values
        token = torch.zeros(batch, 1, dtype=torch.long, device=self.device)
        inputs = {"input_ids": token, "use_cache": True, **given_cache(model, cache)}
        times = [self.timed(lambda: model(**inputs)) for _ in range(STEPS)]
        return statistics.median(times[2:])


def machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name, "devices": torch.cuda.device_count(), "torch": torch.__version__,
        "cuda": torch.version.cuda, "processors": os.cpu_count(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="7B")
    parser.add_argument("--layers", type=int, default=8, help="of the merged models; 32 is a whole 7B")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is measured")
    parser.add_argument("--seconds", type=float, default=540, help="what does not fit is left out")
    parser.add_argument("--work", type=Path, default=Path("/dev/shm"), help="where the models lie meanwhile")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="basis-gpu-", dir=args.work))
    try:
        bench = Bench(args, work)
        print(json.dumps(machine(bench.device)) + "\n\n| what | rate |\n|---|---|")
        bench.attempt("peaks", bench.measure_peaks)
        if "commands" in args.parts:
            print(
                f"\n| {bench.layers} layers | time | all layers | read and written | of copies | of products "
                "| GPU memory |\n|---|---|---|---|---|---|---|"
            )
            bench.attempt("models", bench.models)
            bench.merges()
            bench.inits()
        if "decoding" in args.parts:
            print(
                "\n| context | batch | whole cache | tokens/s, whole | tokens/s, 40 % | ratio |"
                "\n|---|---|---|---|---|---|"
            )
            bench.attempt("decoding", bench.decoding)
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()
        if "eigenvectors" in args.parts:
            columns = " | ".join(f"each of {count}" for count in TOGETHER)
            print(f"\n| eigenvectors of side, float64 | {columns} |\n|---|{'---|' * len(TOGETHER)}")
            bench.attempt("eigenvectors", bench.measure_batches)
    finally:
        shutil.rmtree(work)
    if bench.failures:
        raise SystemExit("\n".join(bench.failures.values()))


if __name__ == "__main__":
    main()
