"""The plan of a KV compression, checked from the model's configuration and headers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from basiscli.checkpoints.dtypes import tensor_bytes
from basiscli.checkpoints.files import INDEX_FILE, SINGLE_FILE
from basiscli.checkpoints.header import TensorSpec
from basiscli.checkpoints.kv_file import KVConfig, read_kv_config
from basiscli.checkpoints.layout import Layout
from basiscli.checkpoints.source import Source
from basiscli.checkpoints.views import Checkpoint
from basiscli.commands.kv.price import kv_price
from basiscli.commands.kv.shape import KVShape, kv_shape
from basiscli.engine.output_folder import check_disk, output_folder
from basiscli.engine.partial import fingerprint_of
from basiscli.engine.pricing import Price
from basiscli.engine.rates import MEASURED, Rates
from basiscli.engine.settings import Cluster, default_workers
from basiscli.errors import InputError, UsageError
from basiscli.model.architecture import kind_by_name
from basiscli.names import natural_key
from basiscli.runtime.export import exported_files
from basiscli.transforms import Kind, Method

Search = Literal["greedy", "spectrum", "uniform"]
Export = Literal["remote-code"]
SEARCH_BATCH = 4
"""Windows of held-out text in one forward of the search of ranks."""
TEACHER_BYTES = 1 << 29
"""Up to so many bytes, the search keeps the dense model's logits of held-out text in memory."""


@dataclass(frozen=True)
class KVSettings:
    """Settings of a KV compression, apart from how much of the cache it keeps."""

    train_steps: int = 800
    batch: int = 2
    """Windows per training step."""
    length: int = 256
    """Tokens per window."""
    moment_windows: int = 64
    """Windows over which second moments are summed."""
    search: Search = "greedy"
    search_windows: int = 8
    """Held-out windows by which ranks are chosen."""
    calibration: str | None = None
    """A file or folder of text; by default the text that comes with basis."""
    fold_values: bool = False
    """Fold the bases of the values into W_v and W_o."""
    export: Export | None = None
    dtype: str | None = None
    device: str = "auto"
    shard_bytes: int = 5_000_000_000
    workers: int = field(default_factory=default_workers)
    seed: int = 0
    resume: bool = True
    overwrite: bool = False
    headers_only: bool = False
    """Whether to plan from headers, without the model's data: such a plan has a price and cannot be run."""
    cluster: Cluster | None = None
    """The Ray cluster that takes the statistics; None for threads of this process."""


@dataclass(frozen=True)
class KVPlan:
    """A KV compression that is checked and ready to run: the opened model, the cache's shape, budget and layout."""

    out: Path
    model: Checkpoint
    method: Method
    values: BaseModel
    ratio: float
    """Share of the cache that is removed."""
    budget: int
    """Levels that are kept, summed over layers, keys and values, and KV heads; see `KVShape.levels`."""
    shape: KVShape
    earlier: KVConfig | None
    """The KV configuration of an input that was compressed before, whose bases are kept; else None."""
    layout: Layout
    settings: KVSettings
    notes: list[str]

    @property
    def train_steps(self) -> int:
        """Training steps; none where the bases are an earlier compression's."""
        return 0 if self.earlier else self.settings.train_steps

    @property
    def train_tokens(self) -> int:
        """Tokens that training sees."""
        return self.train_steps * self.settings.batch * self.settings.length

    @property
    def kept(self) -> float:
        """Share of the cache that is kept."""
        return self.budget / (math.prod(self.shape.entries) * self.shape.levels)

    @property
    def searches(self) -> bool:
        """Whether ranks are searched by the loss on held-out text (`--search greedy`)."""
        return self.settings.search == "greedy" and self.kept < 1

    @property
    def folds(self) -> bool:
        """Whether the output's weights have the values' bases folded in."""
        return self.settings.fold_values or bool(self.earlier and self.earlier.values_folded)

    @property
    def peak_bytes(self) -> int:
        """Estimated bytes of tensors at most: weights in float32, and activations of one batch for its backward.

        A token keeps four times its logits, and in each layer what was measured to be 8 times the hidden size and 4
        times the widest of its matrices.
        """
        tensors = self.model.tensors.values()
        embeddings = [t.shape for t in tensors if kind_by_name(t) is Kind.EMBEDDING]
        vocabulary, hidden = max(embeddings, default=(0, 0), key=math.prod)
        widest = max((max(t.shape) for t in tensors if len(t.shape) > 1 and vocabulary not in t.shape), default=0)
        token = 4 * (4 * vocabulary + self.shape.layers * (8 * hidden + 4 * widest))
        settings = self.settings
        batch = max(1, SEARCH_BATCH if self.searches else 0, settings.batch if self.train_steps else 0)
        teacher = settings.search_windows * settings.length * 4 * vocabulary if self.searches else 0
        kept = teacher if teacher <= TEACHER_BYTES else 0
        return 4 * sum(t.count for t in tensors) + settings.length * batch * token + kept

    def price(self, rates: Rates = MEASURED) -> Price:
        """Return the estimated cost in bytes, operations and seconds at these rates."""
        return kv_price(self, SEARCH_BATCH, rates)

    @property
    def fingerprint(self) -> str:
        """Digest of all that the result depends on."""
        settings = {
            name: value
            for name, value in vars(self.settings).items()
            if name not in {"workers", "resume", "overwrite", "shard_bytes", "headers_only", "cluster"}
        }
        text = self.settings.calibration
        texts = [f for f in (Path(text), *Path(text).rglob("*")) if f.is_file()] if text else []
        facts = [
            self.method.name, self.values.model_dump(mode="json"), self.ratio, settings,
            text and sum(f.stat().st_mtime_ns for f in texts),
            None if self.earlier is None else self.earlier.model_dump(mode="json"),
            [shard.header[0].hex() for shard in self.layout.shards],
        ]  # fmt: skip
        return fingerprint_of(self.model.files, facts)

    def close(self) -> None:
        """Close the input."""
        self.model.close()


def plan_kv(
    source: Source,
    ratio: float,
    method: Method,
    parameters: Mapping[str, Any],
    out: str | Path | None,
    settings: KVSettings,
) -> KVPlan:
    """Return the plan of a KV compression, from the model's configuration and headers.

    Args:
        source: the model.
        ratio: share of the cache to remove.
        method: a KV compression, which gives the bases.
        parameters: of the method, by name.
        out: folder to write; by default MODEL-kvRATIO beside the model.
        settings: of the run.

    Raises:
        UsageError, InputError, ResourceError: anything wrong that shows before the model is loaded.
    """
    if not 0 <= ratio < 1:
        raise UsageError(
            f"--kv-ratio {ratio:g} is no share that can be removed",
            remedy="0 ≤ ratio < 1: --kv-ratio 0.6 removes 60 % of the cache, as --kv-budget 0.4 does",
        )
    values = method.validate(parameters)
    if source.is_adapter:
        raise InputError(
            "this is an adapter, and an adapter has no KV cache",
            file=source.path,
            remedy="merge it into its base first: `basis expand ADAPTER --base BASE`",
        )
    model = Checkpoint.open(source)
    shape = kv_shape(model.source)
    _check_loadable(model)
    if settings.export:
        exported_files(json.dumps(model.config).encode())  # raises now if it cannot be done
    earlier = read_kv_config(model.source.folder)
    if earlier is not None and [len(earlier.key_ranks), len(earlier.key_ranks[0]), earlier.head_dim] != [
        shape.layers, shape.heads, shape.dim,
    ]:  # fmt: skip
        raise InputError(
            "the KV projection beside the weights is another model's",
            file=model.source.folder,
            remedy="remove kv_projection.* to begin anew",
        )
    budget = _budget(ratio, shape)
    dtype = settings.dtype
    specs = [
        TensorSpec(t.name, dtype if dtype and t.dtype in {"F32", "F16", "BF16", "F64"} else t.dtype, t.shape)
        for t in model.tensors.values()
    ]
    layout = Layout.plan(sorted(specs, key=lambda t: natural_key(t.name)), settings.shard_bytes)
    beside = _beside(source)
    folder = output_folder(
        beside.with_name(f"{beside.name}-kv{ratio:g}") if out is None else out,
        [source, model.source],
        overwrite=settings.overwrite,
    )
    notes = []
    if earlier is not None:
        notes.append(f"the bases of {source.label} are used as they are; only the ranks are searched")
    plan = KVPlan(folder, model, method, values, ratio, budget, shape, earlier, layout, settings, notes)
    bases = tensor_bytes("F32", (*shape.entries, shape.dim, shape.dim))
    check_disk(folder, layout.nbytes + 5 * bases, headers_only=settings.headers_only)
    return plan


def _beside(source: Source) -> Path:
    """Return the path that a result goes beside: a model's folder; for a model of the Hub, its name here."""
    if source.repo_id is not None:
        return Path.cwd() / source.repo_id.rpartition("/")[2]
    return source.path.with_suffix("") if source.path.suffix == ".gguf" else source.folder


def _check_loadable(model: Checkpoint) -> None:
    """Refuse weights that are not those that transformers loads from the model's folder."""
    folder = model.source.folder
    found = any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))
    as_loaded = Source(model.source.spec, folder, headers_only=model.source.headers_only)
    if not found or Checkpoint.open(as_loaded).files != model.files:
        raise InputError(
            f"the model has to run, and these weights are not in {SINGLE_FILE} or in shards with an index",
            file=model.source.path,
            remedy="load it with transformers and `save_pretrained` it into a folder of its own",
        )


def _budget(ratio: float, shape: KVShape) -> int:
    """Return how many levels of all heads may stay; every head keeps one."""
    least = shape.layers * 2 * shape.heads
    budget = math.floor((1 - ratio) * least * shape.levels + 1e-9)  # never more than the share that may stay
    if budget < least:
        raise UsageError(
            f"removing {ratio:.0%} leaves {(1 - ratio) * shape.dim:.1f} of {shape.dim} dimensions a head, "
            f"and the least is {shape.dim // shape.levels}",
            remedy=f"--kv-ratio {1 - 1 / shape.levels:g} is the most",
        )
    return budget
