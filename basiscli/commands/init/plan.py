"""The plan of an adapter's initialisation: which weights get an adapter, and what is written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from basiscli.checkpoints.adapter import CONV1D_MODELS
from basiscli.checkpoints.dtypes import DTYPES
from basiscli.checkpoints.files import ADAPTER, ADAPTER_FILE, RESIDUAL
from basiscli.checkpoints.header import TensorSpec
from basiscli.checkpoints.layout import Layout
from basiscli.checkpoints.source import Source
from basiscli.checkpoints.views import Checkpoint
from basiscli.commands.init.calibration import Calibration, calibration_for
from basiscli.commands.init.checks import (
    NF4,
    check_numbers,
    check_options,
    check_pair,
    check_unpacked,
    check_weights,
)
from basiscli.commands.init.formats import AdapterFormat, Module, format_of
from basiscli.commands.init.price import init_price
from basiscli.commands.init.targets import find_targets, in_model_order
from basiscli.engine.output_folder import check_disk, output_folder
from basiscli.engine.partial import fingerprint_of
from basiscli.engine.pricing import Price
from basiscli.engine.rates import MEASURED, Rates
from basiscli.engine.settings import Settings
from basiscli.engine.threads import peak_workspace
from basiscli.errors import InputError
from basiscli.model.names import parts_if_needed
from basiscli.names import natural_key
from basiscli.transforms import Method

DEFAULT_RANK = 16
_COEFFICIENTS_WORKSPACE = 1 << 24  # a block of random values; the weight is not read


@dataclass(frozen=True)
class InitPlan:
    """All that an initialisation will do.

    Weights are named as the checkpoint names its tensors, modules as `named_modules()` of the loaded model does.
    """

    out: Path
    """The folder to make."""
    model: Checkpoint
    base: Checkpoint | None
    """For `extract`: the base that the model was tuned from. The difference is decomposed, and no residual is left."""
    method: Method
    values: BaseModel
    """The method's parameters."""
    rank: int
    """Of every module; the mean where ranks are shared out, the most where `energy` decides."""
    energy: float | None
    """For `extract`: the share of each difference's squared norm that its factors shall hold, at least."""
    alpha: float | None
    """PEFT's `lora_alpha`; None for the rank."""
    rslora: bool
    exact: bool
    """Whether SVDs are exact; else right to 3e-3."""
    quantize: Literal["nf4"] | None
    """The format that the residual will be loaded in, and whose errors the factors take up."""
    targets: dict[str, str]
    """Modules that get an adapter, by the names of their weights.

    The order is that of the model's modules where PEFT numbers them (TinyLoRA), else that of the names.
    """
    target_modules: str | Sequence[str]
    """As they were given."""
    calibration: Calibration | None
    settings: Settings
    notes: list[str]

    @cached_property
    def format(self) -> AdapterFormat:
        """How the adapter is stored."""
        return format_of(self.method, self.values, self.settings.dtype)

    @property
    def has_residual(self) -> bool:
        """Whether the adapter's base is a residual, W − s·B·A; else the base stays as it is."""
        return self.base is None and not self.method.shares_ranks and not self.trains_coefficients

    @property
    def trains_coefficients(self) -> bool:
        """Whether the adapter trains coefficients of random bases, for which no weight is read."""
        return self.method.trains == "coefficients"

    @property
    def ranks_known(self) -> bool:
        """Whether every module's rank is known before the work."""
        return self.energy is None and not self.method.shares_ranks

    @cached_property
    def layout(self) -> Layout:
        """The files to write; none where only the work tells the ranks."""
        return self.layout_of(self.equal_ranks) if self.ranks_known else Layout(())

    @property
    def equal_ranks(self) -> dict[str, int]:
        """The same rank for every target, by weight."""
        return dict.fromkeys(self.targets, self.rank)

    @property
    def expected_bytes(self) -> int:
        """Bytes to be written, an estimate where ranks are not known."""
        return self.layout.nbytes or self.layout_of(self.equal_ranks).nbytes

    def alpha_of(self, rank: int) -> float:
        """Return `lora_alpha` of a module of this rank: where ranks are shared out, all modules have one scaling."""
        if self.method.shares_ranks:
            return (self.alpha or self.rank) * rank / self.rank
        return float(self.alpha or rank)

    def scaling(self, rank: int) -> float:
        """Return what PEFT multiplies the B·A of a module of this rank with: α/r, or α/√r with rsLoRA."""
        return self.alpha_of(rank) / (math.sqrt(rank) if self.rslora else rank)

    @property
    def copied(self) -> list[str]:
        """Tensors of the residual that are as they were in the model."""
        return [name for name in self.model.tensors if name not in self.targets] if self.has_residual else []

    @cached_property
    def transposed(self) -> frozenset[str]:
        """The targets whose weights are stored as [in, out], as GPT-2's Conv1D does."""
        parts = parts_if_needed(self.model)
        if parts is not None:
            return frozenset(name for name in self.targets if name in parts and parts[name].is_transposed)
        return frozenset(self.targets if self.model.config.get("model_type") in CONV1D_MODELS else ())

    @property
    def peak_bytes(self) -> int:
        """Memory of tensors in flight, at most."""
        return peak_workspace(
            [self.workspace(name) for name in self.targets], self.settings.workers, self.settings.memory
        )

    def price(self, rates: Rates = MEASURED) -> Price:
        """Return the bytes, the operations and the hours that it would take at these rates."""
        return init_price(self, rates)

    @property
    def fingerprint(self) -> str:
        """Digest of everything that decides the bytes of the result."""
        files = [*self.model.files, *(self.base.files if self.base else [])]
        files += self.calibration.files if self.calibration else []
        settings = self.settings
        facts = [
            self.method.name, self.values.model_dump(mode="json"), self.rank, self.energy, self.alpha, self.rslora,
            self.exact, self.quantize, list(self.targets.items()), vars(self.calibration) if self.calibration else None,
            settings.device, settings.dtype, settings.seed, settings.allow_nonfinite,
            [shard.header[0].hex() for shard in self.layout.shards],
        ]  # fmt: skip
        return fingerprint_of(files, facts)

    def workspace(self, name: str) -> int:
        """Return the bytes of memory that the work on one weight takes, at most."""
        if self.trains_coefficients:
            return _COEFFICIENTS_WORKSPACE
        tensor = self.model.tensors[name]
        small = self.linear_shape(name)[1] if self.calibration else min(tensor.shape)
        # The weight as stored, in float32 and float64, products of its size; the Gram matrix, its vectors, LAPACK.
        return (36 if self.quantize else 28) * tensor.count + 4 * 8 * small * small

    def linear_shape(self, name: str) -> tuple[int, int]:
        """Return (out_features, in_features) of a weight."""
        rows, columns = self.model.tensors[name].shape
        return (columns, rows) if name in self.transposed else (rows, columns)

    @cached_property
    def modules(self) -> dict[str, Module]:
        """What a format needs to know of each target, by weight."""
        found = {}
        for index, (name, module) in enumerate(self.targets.items()):
            rows, columns = self.linear_shape(name)
            found[name] = Module(module, index, columns, rows, self.settings.dtype or self.model.tensors[name].dtype)
        return found

    def adapter_tensors(self, name: str, rank: int) -> list[TensorSpec]:
        """Return what the adapter holds of a weight, as its format names it: nothing for rank 0."""
        return self.format.tensors(self.modules[name], rank) if rank else []

    def layout_of(self, ranks: Mapping[str, int]) -> Layout:
        """Return the files for such ranks by weight: the adapter, and the residual if there is one."""
        tensors = [spec for name, rank in ranks.items() for spec in self.adapter_tensors(name, rank)]
        adapter = Layout.plan(tensors, self.settings.shard_bytes, single_file=ADAPTER_FILE)
        if self.base is not None:
            return adapter
        if not self.has_residual:
            return Layout.of_folders({ADAPTER: adapter})
        whole = [
            TensorSpec(t.name, self.settings.dtype or t.dtype if DTYPES[t.dtype].floating else t.dtype, t.shape)
            for t in sorted(self.model.tensors.values(), key=lambda t: natural_key(t.name))
        ]
        return Layout.of_folders({ADAPTER: adapter, RESIDUAL: Layout.plan(whole, self.settings.shard_bytes)})

    def close(self) -> None:
        """Close the inputs."""
        self.model.close()
        if self.base is not None:
            self.base.close()


def make_plan(
    source: Source,
    method: Method,
    parameters: Mapping[str, Any],
    *,
    base: Source | None,
    rank: int | None,
    energy: float | None,
    alpha: float | None,
    rslora: bool,
    exact: bool,
    quantize: str | None,
    target_modules: str | Sequence[str],
    calibration: Calibration | None,
    out: str | Path | None,
    settings: Settings,
) -> InitPlan:
    """Return the plan of an initialisation or an extraction, from headers and configurations alone.

    Raises:
        UsageError, InputError, ResourceError: whatever can be refused before the work begins.
    """
    values = method.validate(parameters)
    check_numbers(rank, energy)
    calibration = calibration_for(method, calibration)
    check_options(method, rank or DEFAULT_RANK, alpha, rslora, quantize)
    if source.is_adapter:
        raise InputError("this is an adapter; a full checkpoint is needed", file=source.path, remedy="give its base")
    model = Checkpoint.open(source)
    other = Checkpoint.open(base) if base is not None else None
    checkpoints = [model] if other is None else [model, other]
    for checkpoint in checkpoints:
        check_unpacked(checkpoint)
    targets = find_targets(model, target_modules)
    if method.trains == "values":
        targets = in_model_order(model, targets)
    notes = check_pair(model, other, targets) if other is not None else []
    folder = output_folder(
        out or Path(f"{source.label.rpartition('/')[2].partition('@')[0]}-{method.name}"),
        [source, *(checkpoint.source for checkpoint in checkpoints)],
        overwrite=settings.overwrite,
    )
    if rank is None:
        most = max(min(model.tensors[name].shape) for name in targets)
        rank = DEFAULT_RANK if energy is None else most
    check_weights(checkpoints, targets, rank if energy is None else None)
    plan = InitPlan(
        folder, model, other, method, values, rank, energy, alpha, rslora, exact, NF4 if quantize else None, targets,
        target_modules, calibration, settings, notes,
    )  # fmt: skip
    check_disk(folder, plan.expected_bytes if energy is None else 0, headers_only=settings.headers_only)
    return plan
