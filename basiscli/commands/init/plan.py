"""The plan of an adapter's initialisation: which weights get factors, and what is written."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel

from basiscli.checkpoints.adapter import CONV1D_MODELS
from basiscli.checkpoints.dtypes import DTYPES
from basiscli.checkpoints.files import ADAPTER, ADAPTER_FILE, RESIDUAL
from basiscli.checkpoints.header import TensorSpec
from basiscli.checkpoints.layout import Layout
from basiscli.checkpoints.nola import coefficient_counts
from basiscli.checkpoints.source import Source
from basiscli.checkpoints.views import Checkpoint
from basiscli.commands.init.price import init_price
from basiscli.commands.init.targets import find_targets, in_model_order
from basiscli.engine.output_place import check_disk, output_place
from basiscli.engine.partial import fingerprint_of
from basiscli.engine.pricing import Price
from basiscli.engine.rates import MEASURED, Rates
from basiscli.engine.settings import Settings
from basiscli.engine.threads import peak_workspace
from basiscli.errors import InputError, UsageError
from basiscli.names import natural_key
from basiscli.transforms import Method

DEFAULT_RANK = 16
DEFAULT_TOKENS, DEFAULT_LENGTH = 16384, 512
NF4: Final = "nf4"
COEFFICIENTS_WORKSPACE = 1 << 24  # a block of random values; the weight is not read
NF4_ROUNDS = 5  # what QPiSSA's paper takes: the error falls fast at first, and each round is another decomposition
MOST_VALUES = 128  # PEFT's form of trained values holds rank³ numbers a module: 2 MB here, 8 once PEFT has saved it


@dataclass(frozen=True)
class Calibration:
    """The text whose activations a method wants."""

    place: str | None
    """File or folder; None for the built-in mix."""
    tokens: int
    length: int
    """Tokens a window."""


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
    """Of every module; the mean where ranks are shared out, the most where `energy` decides."""
    energy: float | None
    """For `extract`: the share of each difference's squared norm that its factors shall hold, at least."""
    alpha: float | None
    """None for the rank."""
    rslora: bool
    exact: bool
    quantize: Literal["nf4"] | None
    """The format that the residual will be loaded in, and whose errors the factors take up."""
    targets: dict[str, str]
    """Weights in their order, and what the model calls their modules once it is loaded.

    The order is that of the model's modules where PEFT numbers them (trained values), else that of the names.
    """
    target_modules: str | Sequence[str]
    """As they were given."""
    calibration: Calibration | None
    settings: Settings
    notes: list[str]

    @property
    def has_residual(self) -> bool:
        """Whether what the adapter holds is taken from the base."""
        return self.base is None and not self.method.shares_ranks and not self.trains_coefficients

    @property
    def trains_values(self) -> bool:
        """Whether the adapter trains the values between its factors alone."""
        return self.method.trains == "values"

    @property
    def trains_coefficients(self) -> bool:
        """Whether the adapter trains coefficients of random bases, and the base stays as it is."""
        return self.method.trains == "coefficients"

    @cached_property
    def places(self) -> dict[str, int]:
        """The number of each target in their order."""
        return {name: place for place, name in enumerate(self.targets)}

    @property
    def ranks_known(self) -> bool:
        """Whether every module's rank is known before the work."""
        return self.energy is None and not self.method.shares_ranks

    @cached_property
    def layout(self) -> Layout:
        """The files to write; none where only the work tells the ranks."""
        return self.layout_of(dict.fromkeys(self.targets, self.rank)) if self.ranks_known else Layout(())

    @property
    def expected_bytes(self) -> int:
        """Bytes to be written, an estimate where ranks are not known."""
        return self.layout.nbytes or self.layout_of(dict.fromkeys(self.targets, self.rank)).nbytes

    def alpha_of(self, rank: int) -> float:
        """Return `lora_alpha` of a module of this rank."""
        if self.method.shares_ranks:
            return (self.alpha or self.rank) * rank / self.rank
        return float(self.alpha or rank)

    def scaling(self, rank: int) -> float:
        """Return what PEFT multiplies the B·A of a module of this rank with."""
        return self.alpha_of(rank) / (math.sqrt(rank) if self.rslora else rank)

    @property
    def copied(self) -> list[str]:
        """Tensors of the residual that are as they were."""
        return [name for name in self.model.tensors if name not in self.targets] if self.has_residual else []

    @property
    def transposed(self) -> bool:
        """Whether linear weights are stored as (in, out), as GPT-2's Conv1D does."""
        return self.model.config.get("model_type") in CONV1D_MODELS

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
        settings = self.settings
        calibration = vars(self.calibration) if self.calibration else None
        if self.calibration and self.calibration.place:
            place = Path(self.calibration.place)
            files += [place] if place.is_file() else sorted(file for file in place.rglob("*") if file.is_file())
        facts = [
            self.method.name, self.values.model_dump(mode="json"), self.rank, self.energy, self.alpha, self.rslora,
            self.exact, self.quantize, list(self.targets.items()), calibration, settings.device, settings.dtype,
            settings.seed, settings.allow_nonfinite, [shard.header[0].hex() for shard in self.layout.shards],
        ]  # fmt: skip
        return fingerprint_of(files, facts)

    def workspace(self, name: str) -> int:
        """Return the bytes of memory that the work on one weight takes, at most."""
        if self.trains_coefficients:
            return COEFFICIENTS_WORKSPACE
        tensor = self.model.tensors[name]
        small = self.linear_shape(name)[1] if self.calibration else min(tensor.shape)
        # The weight as stored, in float32 and float64, products of its size; the Gram matrix, its vectors, LAPACK.
        return (36 if self.quantize else 28) * tensor.count + 4 * 8 * small * small

    def factors(self, name: str, rank: int) -> list[TensorSpec]:
        """Return what the adapter holds of a weight, as PEFT names it: nothing for rank 0.

        A [rank, in] and B [out, rank]. Where values are trained, it is PEFT's TinyLoRA, ΔW = B (Σᵢ vᵢ Pᵢ) A, with
        P [rank, rank, rank], which says where between B and A each value stands, and v [rank]. Where coefficients are,
        it is a vector of them a factor.
        """
        if not rank:
            return []
        out_features, in_features = self.linear_shape(name)
        dtype = self.settings.dtype or self.model.tensors[name].dtype
        module = f"base_model.model.{self.targets[name]}"
        if self.trains_coefficients:  # as exact as they are trained, whatever the model's dtype: they are few
            counts = coefficient_counts(self.values.bases, rank, in_features, out_features)  # type: ignore[attr-defined]
            dtype = self.settings.dtype or "F32"
            return [TensorSpec(f"{module}.nola_{f}", dtype, (n,)) for f, n in zip("ab", counts, strict=True)]
        form = "{}.tinylora_{}" if self.trains_values else "{}.lora_{}.weight"
        specs = [
            TensorSpec(form.format(module, "A"), dtype, (rank, in_features)),
            TensorSpec(form.format(module, "B"), dtype, (out_features, rank)),
        ]
        if self.trains_values:
            specs += [
                TensorSpec(form.format(module, "P"), "U8", (rank, rank, rank)),
                TensorSpec(f"base_model.tinylora_v.{self.places[name]}", dtype, (rank,)),
            ]
        return specs

    def linear_shape(self, name: str) -> tuple[int, int]:
        """Return (out_features, in_features) of a weight."""
        rows, columns = self.model.tensors[name].shape
        return (columns, rows) if self.transposed else (rows, columns)

    def layout_of(self, ranks: Mapping[str, int]) -> Layout:
        """Return the files for such ranks by weight; a weight of rank 0 has no factors."""
        factors = [spec for name, rank in ranks.items() for spec in self.factors(name, rank)]
        adapter = Layout.plan(factors, self.settings.shard_bytes, single_file=ADAPTER_FILE)
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


def plan_init(
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
    """Look at the headers and decide what will be done.

    Raises:
        UsageError, InputError, ResourceError: whatever can be refused before the work begins.
    """
    values = method.validate(parameters)
    if rank is not None and rank < 1:
        raise UsageError(f"rank {rank}", remedy="at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"energy {energy:g}", remedy="a share of the squared norm: more than 0, at most 1")
    calibration = _calibration(method, calibration)
    _check_form(method, rank or DEFAULT_RANK, alpha, rslora, quantize)
    if alpha is not None and not (alpha > 0 and math.isfinite(alpha)):
        raise UsageError(f"alpha {alpha:g}", remedy="a positive number; the rank by default")
    if source.is_adapter:
        raise InputError("this is an adapter; a full checkpoint is needed", file=source.path, remedy="give its base")
    model = Checkpoint.open(source)
    other = Checkpoint.open(base) if base is not None else None
    for checkpoint in filter(None, (model, other)):
        _refuse_packed(checkpoint)
    targets = find_targets(model, target_modules)
    if method.trains == "values":
        targets = in_model_order(model, targets)
    notes: list[str] = []
    if other is not None:
        notes += _check_pair(model, other, targets)
    most = max(min(model.tensors[name].shape) for name in targets)
    place = output_place(
        out or Path(f"{source.label.rpartition('/')[2].partition('@')[0]}-{method.name}"),
        [source, model.source, *([other.source] if other else [])],
        overwrite=settings.overwrite,
    )
    plan = InitPlan(
        place, model, other, method, values, rank or (most if energy is not None else DEFAULT_RANK), energy, alpha,
        rslora, exact, NF4 if quantize else None, targets, target_modules, calibration, settings,
        notes,
    )  # fmt: skip
    _check_ranks(plan)
    check_disk(place, plan.expected_bytes if energy is None else 0, headers_only=settings.headers_only)
    return plan


def _check_form(method: Method, rank: int, alpha: float | None, rslora: bool, quantize: str | None) -> None:
    """Refuse options that the method's kind of adapter has no place for."""
    values = method.trains == "values"
    if quantize is not None and quantize != NF4:
        raise UsageError(f"no 4-bit format is called '{quantize}'", remedy=f"--quantize {NF4}")
    if quantize is not None and (values or not method.principal):
        reason = (
            "PEFT does not load trained values on a 4-bit base"
            if values
            else "its factors are not the leading part of the weight, and would be the rounding's noise when they are "
            "taken again of what the 4-bit base lacks"
        )
        raise UsageError(f"{method.name} has no start for a quantised base: {reason}", remedy="--method pissa")
    if values and (alpha is not None or rslora):
        raise UsageError(
            f"{method.name} trains singular values, which no scaling multiplies",
            remedy="leave out --alpha and --rslora",
        )
    if values and rank > MOST_VALUES:
        raise UsageError(
            f"rank {rank} of trained values: PEFT's form of them holds rank³ numbers a module",
            remedy=f"--rank {MOST_VALUES} at most",
        )


def _calibration(method: Method, given: Calibration | None) -> Calibration | None:
    """Return what the method needs; refuse what it does not, and what is not there."""
    if not method.needs_calibration:
        if given is not None:
            raise UsageError(f"{method.name} looks at the weights alone", remedy="leave out --calibration and --tokens")
        return None
    given = given or Calibration(None, DEFAULT_TOKENS, DEFAULT_LENGTH)
    if given.length < 1 or given.tokens < given.length:
        raise UsageError(
            f"{given.tokens} tokens in windows of {given.length}", remedy="give --tokens for one window at least"
        )
    if given.place is not None and not Path(given.place).exists():
        raise InputError("no such calibration file", file=given.place, remedy="check the path")
    return given


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
        if plan.energy is None and plan.rank > min(tensor.shape):
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
