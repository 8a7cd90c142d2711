"""The plan of compressing a LoRA adapter to coefficients of random bases."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from basiscli.checkpoints.adapter import Adapter
from basiscli.checkpoints.files import ADAPTER_CONFIG, ADAPTER_FILE
from basiscli.checkpoints.header import TensorSpec
from basiscli.checkpoints.layout import Layout
from basiscli.checkpoints.nola import PREFIX, coefficient_counts, is_nola
from basiscli.checkpoints.packing import stored_form
from basiscli.checkpoints.source import Source
from basiscli.checkpoints.views import Checkpoint
from basiscli.engine.output_folder import check_disk, output_folder
from basiscli.engine.partial import fingerprint_of
from basiscli.engine.rates import MEASURED, Rates
from basiscli.errors import InputError, UsageError
from basiscli.hub.resolve import resolve, resolve_base
from basiscli.model.adapted import adapted
from basiscli.model.names import loaded_names

BITS = (4, 8, 16)


@dataclass(frozen=True)
class NolaSettings:
    """Settings of the fit and training of coefficients, and of the lowest fidelity that is written."""

    calibration: str | None = None
    """A file or folder of text, or a file of tokens; None for the built-in mix."""
    steps: int = 200
    """Training steps on the adapter's logits; 0 for the layer-wise fit alone."""
    batch: int = 2
    """Windows per step."""
    length: int = 256
    """Tokens per window."""
    learning_rate: float = 0.02
    """Of AdamW, as a share of the root mean square of a module's coefficients."""
    weights_only: bool = False
    """Whether to fit ΔW itself, without a base and text."""
    min_fidelity: float = 0.5
    """Below this share of the adapter's effect nothing is written."""
    force: bool = False
    """Whether to write below that, too."""
    device: str = "auto"
    seed: int = 0
    overwrite: bool = False
    headers_only: bool = False
    """Whether to plan from headers, without the inputs' data."""


@dataclass(frozen=True)
class NolaModule:
    """One linear layer that the adapter changes."""

    name: str
    """Name in the adapter's file."""
    loaded: str
    """Name in the loaded base; the same as `name` without a base."""
    in_features: int
    out_features: int


@dataclass(frozen=True)
class NolaPlan:
    """A compression of an adapter that is checked and ready to run."""

    out: Path
    adapter: Adapter
    base: Checkpoint | None
    modules: list[NolaModule]
    rank: int
    bases: int
    """Random matrices per factor."""
    bits: int
    """Of a stored coefficient."""
    settings: NolaSettings
    notes: list[str]

    @property
    def layout(self) -> Layout:
        """Layout of the output: one file of coefficients."""
        return Layout.plan([spec for m in self.modules for spec in self.specs(m)], 1 << 62, single_file=ADAPTER_FILE)

    @property
    def coefficients(self) -> int:
        """Number of coefficients in all modules."""
        return sum(sum(self.counts(module)) for module in self.modules)

    def price(self, rates: Rates = MEASURED) -> None:
        """Return None: no rates were measured for the fit of coefficients."""

    @property
    def fingerprint(self) -> str:
        """Digest of all that the result depends on."""
        files = [*self.adapter.weights.files, *(self.base.files if self.base else [])]
        text = self.settings.calibration
        if text is not None:
            path = Path(text)
            files += [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        return fingerprint_of(files, [self.rank, self.bases, self.bits, vars(self.settings)])

    def counts(self, module: NolaModule) -> tuple[int, int]:
        """Return the numbers of coefficients of a module's A and B."""
        return coefficient_counts(self.bases, self.rank, module.in_features, module.out_features)

    def specs(self, module: NolaModule) -> list[TensorSpec]:
        """Return the tensors that are stored of a module: coefficients of A, then of B."""
        return [
            TensorSpec(f"{PREFIX}{module.name}.nola_{factor}", *stored_form(count, self.bits))
            for factor, count in zip("ab", self.counts(module), strict=True)
        ]

    def close(self) -> None:
        """Close the inputs."""
        self.adapter.weights.close()
        if self.base is not None:
            self.base.close()


def plan_nola(
    source: Source,
    *,
    base: str | None,
    bases: int,
    rank: int | None,
    bits: int,
    out: str | Path | None,
    settings: NolaSettings,
) -> NolaPlan:
    """Return the plan of an adapter's compression, from headers and configuration.

    Args:
        source: the adapter.
        base: a folder or Hub id; None for the base that the adapter names.
        bases: random matrices per factor.
        rank: of the result; None for the largest that the bases span, up to the adapter's.
        bits: of a stored coefficient: 16, 8 or 4.
        out: folder to write; by default ADAPTER-nola here.
        settings: of the run.

    Raises:
        UsageError, InputError, HubError, ResourceError: anything wrong that shows before weights are read.
    """
    _check_numbers(bases, rank, bits, settings)
    if not source.is_adapter:
        raise InputError("not an adapter", file=source.path, remedy="--method nola compresses a PEFT LoRA folder")
    if is_nola(source):
        raise InputError("this is a NOLA adapter already", file=source.path, remedy="give the LoRA it was made from")
    adapter = Adapter(source)
    _check_plain(adapter)
    if settings.weights_only:
        if base is not None or settings.calibration is not None:
            raise UsageError("--weights-only takes no base and no text", remedy="leave out --base and --calibration")
        checkpoint, modules = None, _alone(adapter)
    else:
        checkpoint, modules = _on_base(adapter, base, headers_only=settings.headers_only)
    name = source.label.rpartition("/")[2].partition("@")[0]
    inputs = [source, *([checkpoint.source] if checkpoint else [])]
    folder = output_folder(out or Path(f"{name}-nola"), inputs, overwrite=settings.overwrite)
    # More columns than the bases span cost the columns that they do span: of two factors of k coefficients each the
    # share that random bases hold falls with the square of the rank.
    widest = max(max(m.in_features, m.out_features) for m in modules)
    rank = rank or max(1, min(adapter.rank, bases // widest))
    plan = NolaPlan(folder, adapter, checkpoint, modules, rank, bases, bits, settings, [])
    plan.notes.extend(_notes(plan))
    check_disk(folder, plan.layout.nbytes, headers_only=settings.headers_only)
    return plan


def _check_numbers(bases: int, rank: int | None, bits: int, settings: NolaSettings) -> None:
    least = {"bases": (bases, 1), "rank": (1 if rank is None else rank, 1), "steps": (settings.steps, 0)}
    least |= {"batch": (settings.batch, 1), "length": (settings.length, 16)}
    for name, (value, lowest) in least.items():
        if value < lowest:
            raise UsageError(f"{name} {value}", remedy=f"at least {lowest}")
    if bits not in BITS:
        raise UsageError(f"coefficients of {bits} bits", remedy="--bits 16, 8 or 4")
    if not 0 <= settings.min_fidelity <= 1:
        raise UsageError(f"min_fidelity {settings.min_fidelity:g}", remedy="a share from 0 to 1")
    if not (settings.learning_rate > 0 and math.isfinite(settings.learning_rate)):
        raise UsageError(f"learning rate {settings.learning_rate:g}", remedy="a positive number, 0.02 by default")
    if settings.calibration is not None and not Path(settings.calibration).exists():
        raise InputError("no such calibration file", file=settings.calibration, remedy="check the path")


def _check_plain(adapter: Adapter) -> None:
    """Refuse an adapter that does more than to add s·B·A to linear layers."""
    more = [*adapter.replaced.values(), *(stored for stored, _ in adapter.bias_deltas.values())]
    more += [m.a for m in adapter.modules.values() if m.embedding or len(adapter.weights.tensors[m.a].shape) != 2]
    if more:
        raise InputError(
            "the adapter holds more than factors of linear layers",
            file=adapter.weights.files[0],
            tensor=more[0],
            remedy="give an adapter without modules_to_save, trained biases, embeddings and convolutions",
        )


def _alone(adapter: Adapter) -> list[NolaModule]:
    return [NolaModule(name, name, *_sizes(adapter, name)) for name in adapter.modules]


def _on_base(adapter: Adapter, given: str | None, *, headers_only: bool) -> tuple[Checkpoint, list[NolaModule]]:
    """Open the base, and find what its class calls the adapter's modules once it is loaded."""
    source = adapter.source
    if given is None and source.base_model is None:
        raise UsageError(
            "the adapter does not name its base", file=source.path / ADAPTER_CONFIG, remedy="--base, or --weights-only"
        )
    if given is None:
        found = resolve_base(str(source.base_model), source, headers_only=headers_only)
    else:
        found = resolve(given, headers_only=headers_only)
    base = Checkpoint.open(found)
    view = adapted(adapter, base)
    loaded = loaded_names(base, view.modules)
    modules = [
        NolaModule(name, loaded[weight].removesuffix(".weight"), *_sizes(adapter, name))
        for weight, name in view.modules.items()
    ]
    return base, modules


def _sizes(adapter: Adapter, module: str) -> tuple[int, int]:
    factors, tensors = adapter.modules[module], adapter.weights.tensors
    return tensors[factors.a].shape[1], tensors[factors.b].shape[0]


def _notes(plan: NolaPlan) -> Iterable[str]:
    stored = sum(t.count for t in plan.adapter.weights.tensors.values())
    if plan.coefficients >= stored:
        yield f"{plan.coefficients:,} coefficients are no fewer than the adapter's {stored:,} parameters"
    if plan.base is None:
        yield "without a base ΔW itself is matched, and what it does to any input counts alike"
