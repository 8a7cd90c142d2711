"""The plan of an adapter's initialisation: which weights get factors, and what is written."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from basiscli.checkpoints.adapter import CONV1D_MODELS
from basiscli.checkpoints.architecture import Kind, kinds, loaded_names
from basiscli.checkpoints.dtypes import DTYPES
from basiscli.checkpoints.header import TensorSpec
from basiscli.checkpoints.layout import Layout
from basiscli.checkpoints.source import Source
from basiscli.checkpoints.views import Checkpoint
from basiscli.engine.local import peak_workspace
from basiscli.engine.merge_plan import ADAPTER_FILE, Settings
from basiscli.engine.output_place import check_disk, output_place
from basiscli.errors import InputError, UsageError, did_you_mean
from basiscli.names import natural_key
from basiscli.transforms import Method
from basiscli.version import __version__

ADAPTER, RESIDUAL = "adapter", "residual"
ALL_LINEAR = "all-linear"
_HEADS = {"lm_head", "embed_out", "score", "classifier"}  # PEFT's all-linear leaves output layers alone, too


@dataclass(frozen=True)
class InitPlan:
    """All that an initialisation will do."""

    out: Path
    model: Checkpoint
    base: Checkpoint | None
    """For `extract`: the base that the model was tuned from; the difference is decomposed, and no residual is left."""
    method: Method
    values: BaseModel
    rank: int
    alpha: float
    rslora: bool
    exact: bool
    targets: dict[str, str]
    """Weights in their order, and what the model calls their modules once it is loaded."""
    layout: Layout
    settings: Settings
    notes: list[str]

    @property
    def scaling(self) -> float:
        """What PEFT multiplies B·A with."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def copied(self) -> list[str]:
        """Tensors of the residual that are as they were."""
        return [] if self.base else [name for name in self.model.tensors if name not in self.targets]

    @property
    def transposed(self) -> bool:
        """Whether linear weights are stored as (in, out), as GPT-2's Conv1D does."""
        return self.model.config.get("model_type") in CONV1D_MODELS

    @property
    def peak_bytes(self) -> int:
        """Memory of tensors in flight, at most."""
        return peak_workspace([self.workspace(name) for name in self.targets], self.settings.workers)

    @property
    def fingerprint(self) -> str:
        """Digest of everything that decides the bytes of the result."""
        files = [*self.model.files, *(self.base.files if self.base else [])]
        stamps = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        settings = self.settings
        facts = [
            __version__, self.method.name, self.values.model_dump(mode="json"), self.rank, self.alpha, self.rslora,
            self.exact, list(self.targets.items()), stamps, settings.device, settings.dtype, settings.seed,
            settings.allow_nonfinite, [shard.header[0].hex() for shard in self.layout.shards],
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def workspace(self, name: str) -> int:
        """Return the bytes of memory that the work on one weight takes, at most."""
        tensor = self.model.tensors[name]
        small = min(tensor.shape)
        # The weight as stored, in float32 and float64, products of its size; the Gram matrix, its vectors, LAPACK.
        return 28 * tensor.count + 4 * 8 * small * small

    def keys(self, name: str) -> tuple[str, str]:
        """Return the names that PEFT gives the two factors, A and B, of a weight."""
        module = f"base_model.model.{self.targets[name]}"
        return f"{module}.lora_A.weight", f"{module}.lora_B.weight"

    def linear_shape(self, name: str) -> tuple[int, int]:
        """Return (out_features, in_features) of a weight."""
        rows, columns = self.model.tensors[name].shape
        return (columns, rows) if self.transposed else (rows, columns)

    def close(self) -> None:
        """Close the inputs."""
        self.model.close()
        if self.base is not None:
            self.base.close()


def plan_init(
    source: Source,
    method: Method,
    parameters: Mapping[str, Any],
    *,
    base: Source | None,
    rank: int,
    alpha: float | None,
    rslora: bool,
    exact: bool,
    target_modules: str | Sequence[str],
    out: str | Path | None,
    settings: Settings,
) -> InitPlan:
    """Look at the headers and decide what will be done.

    Raises:
        UsageError, InputError, ResourceError: whatever can be refused before the work begins.
    """
    values = method.validate(parameters)
    if rank < 1:
        raise UsageError(f"rank {rank}", remedy="at least 1")
    alpha = float(rank) if alpha is None else alpha
    if not (alpha > 0 and math.isfinite(alpha)):
        raise UsageError(f"alpha {alpha:g}", remedy="a positive number; the rank by default")
    if source.is_adapter:
        raise InputError("this is an adapter; a full checkpoint is needed", file=source.path, remedy="give its base")
    model = Checkpoint.open(source)
    other = Checkpoint.open(base) if base is not None else None
    for checkpoint in filter(None, (model, other)):
        _refuse_packed(checkpoint)
    targets = _targets(model, target_modules)
    notes: list[str] = []
    if other is not None:
        notes += _check_pair(model, other, targets)
    place = output_place(
        out or Path(f"{source.label.rpartition('/')[2].partition('@')[0]}-{method.name}"),
        [source, model.source, *([other.source] if other else [])],
        overwrite=settings.overwrite,
    )
    plan = InitPlan(
        place, model, other, method, values, rank, alpha, rslora, exact, targets, Layout(()), settings, notes
    )
    _check_ranks(plan)
    layout = _layout(plan)
    check_disk(place, layout.nbytes)
    return InitPlan(**{**vars(plan), "layout": layout})


def _targets(model: Checkpoint, wanted: str | Sequence[str]) -> dict[str, str]:
    """Return the weights that `target_modules` means, read as PEFT reads it, and their modules."""
    kind_of = kinds(model, model.tensors).by_name
    linear = [n for n, t in model.tensors.items() if kind_of[n] is Kind.LINEAR and n.endswith(".weight") and t.count]
    loaded = loaded_names(model, sorted(linear, key=natural_key))
    weights = {module.removesuffix(".weight"): name for name, module in loaded.items()}
    modules = list(weights)
    if not modules:
        raise InputError(
            "the checkpoint holds no linear layer", file=model.source.path, remedy="give the folder of a whole model"
        )
    leaves = {module.rpartition(".")[2] for module in modules}
    if wanted == ALL_LINEAR:
        chosen = [module for module in modules if module.rpartition(".")[2] not in _HEADS]
    elif isinstance(wanted, str):
        try:
            pattern = re.compile(wanted)
        except re.error as error:
            raise UsageError(
                f"--target-modules '{wanted}' is no regular expression: {error}",
                remedy=f"mend it, or give '{ALL_LINEAR}' or names out of {', '.join(sorted(leaves))}",
            ) from error
        chosen = [module for module in modules if pattern.fullmatch(module)]
    else:
        unknown = [word for word in wanted if not any(m == word or m.endswith(f".{word}") for m in modules)]
        if unknown:
            raise UsageError(f"no linear layer is called '{unknown[0]}'", remedy=did_you_mean(unknown[0], leaves))
        chosen = [m for m in modules if any(m == word or m.endswith(f".{word}") for word in wanted)]
    if not chosen:
        raise UsageError(
            f"--target-modules {wanted} matches no linear layer",
            remedy=f"'{ALL_LINEAR}', names out of {', '.join(sorted(leaves))}, or a regular expression for whole names",
        )
    return {weights[module]: module for module in chosen}


def _refuse_packed(checkpoint: Checkpoint) -> None:
    config = checkpoint.config.get("quantization_config")
    if config:
        name = config.get("quant_method", "a quantiser") if isinstance(config, dict) else config
        raise InputError(
            f"the weights are packed by {name}: codes have no singular values",
            file=checkpoint.source.folder / "config.json",
            remedy="give the unquantised checkpoint, and quantise the residual afterwards",
        )
    if "auto_map" in checkpoint.config:
        raise InputError(
            "the model brings its own code, which is not run",
            file=checkpoint.source.folder / "config.json",
            remedy="give a model of an architecture that transformers has",
        )


def _check_ranks(plan: InitPlan) -> None:
    most = min(min(plan.model.tensors[name].shape) for name in plan.targets)
    for name in plan.targets:
        for tensor in (checkpoint.tensors[name] for checkpoint in (plan.model, plan.base) if checkpoint):
            if not DTYPES[tensor.dtype].floating or DTYPES[tensor.dtype].bits < 16:
                raise InputError(
                    f"{tensor.dtype} weights are not decomposed", file=tensor.file, tensor=name,
                    remedy="give the unquantised checkpoint",
                )  # fmt: skip
        if plan.rank > min(tensor.shape):
            raise UsageError(
                f"rank {plan.rank} is larger than the matrix ({' × '.join(map(str, tensor.shape))})",
                tensor=name,
                remedy=f"--rank {most} at most, or fewer targets",
            )


def _check_pair(model: Checkpoint, base: Checkpoint, targets: Collection[str]) -> list[str]:
    """Refuse a base of other shapes; note what is left out, changed or not: only headers are known here."""
    for name in targets:
        found = base.tensors.get(name)
        if found is None or found.shape != model.tensors[name].shape:
            what = "lacks it" if found is None else f"has {list(found.shape)}, not {list(model.tensors[name].shape)}"
            raise InputError(
                f"the base ({base.source.spec}) {what}",
                file=base.source.path,
                tensor=name,
                remedy="give the base that the model was tuned from with --base",
            )
    left = len(model.tensors) - len(targets)
    one = "1 other tensor is" if left == 1 else f"{left} other tensors are"
    return [f"{one} not compared: what the fine-tune changed there is not in the adapter"] if left else []


def _layout(plan: InitPlan) -> Layout:
    factors = []
    for name in plan.targets:
        key_a, key_b = plan.keys(name)
        out_features, in_features = plan.linear_shape(name)
        dtype = plan.settings.dtype or plan.model.tensors[name].dtype
        factors += [
            TensorSpec(key_a, dtype, (plan.rank, in_features)),
            TensorSpec(key_b, dtype, (out_features, plan.rank)),
        ]
    adapter = Layout.plan(factors, plan.settings.shard_bytes, single_file=ADAPTER_FILE)
    if plan.base is not None:
        return adapter
    whole = [
        TensorSpec(t.name, plan.settings.dtype or t.dtype if DTYPES[t.dtype].floating else t.dtype, t.shape)
        for t in sorted(plan.model.tensors.values(), key=lambda t: natural_key(t.name))
    ]
    return Layout.of_folders({ADAPTER: adapter, RESIDUAL: Layout.plan(whole, plan.settings.shard_bytes)})
