"""The way back: a trained PiSSA, SVFit or NOLA adapter as plain LoRA of the original base, any as a checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from basiscli.checkpoints.adapter import Adapter
from basiscli.checkpoints.digests import digest, stored_digest, weights_digest
from basiscli.checkpoints.files import ADAPTER_CONFIG, ADAPTER_FILE
from basiscli.checkpoints.header import TensorSpec
from basiscli.checkpoints.layout import Layout
from basiscli.checkpoints.nola import is_nola
from basiscli.checkpoints.source import Source
from basiscli.checkpoints.tinylora import TrainedValues, is_tinylora, selectors
from basiscli.checkpoints.writer import PartialOutput
from basiscli.cli.keywords import keywords
from basiscli.commands.expand.card import expanded_card
from basiscli.commands.expand.options import ExpandOptions
from basiscli.commands.merge.api import merge
from basiscli.engine.output_place import check_disk, output_place
from basiscli.errors import InputError, UsageError
from basiscli.hub.resolve import resolve
from basiscli.progress import Progress, Silent
from basiscli.reports.schema import read_report

if TYPE_CHECKING:
    from torch import Tensor

    Planned = Iterable[tuple[TensorSpec, Tensor | None]]
    Tensors = Callable[[bool], Planned]


@dataclass(frozen=True)
class ExpandResult:
    """Where the result is."""

    path: Path
    kind: str
    """'adapter' or 'checkpoint'."""
    weights_digest: str
    modules: int


@keywords(ExpandOptions)
def expand(adapter: str | Path, *, progress: Progress | None = None, **options: Any) -> ExpandResult:
    """Make of an adapter what everything can load.

    With `initial`, the adapter was trained from a start that is not zero (`basis init`: PiSSA, MiLoRA, OLoRA) on its
    residual. What it changed of the original model is s(BA − B₀A₀), a LoRA of twice the rank on the original base:
    A' = [A; A₀], B' = [B, −B₀]. Where singular values were trained (SVFit), it is B diag(v − σ) A, of the same rank.
    Without, the adapter is added to its base: a full checkpoint. A NOLA adapter becomes plain LoRA, for which its base
    is not needed, and a checkpoint where `base` is given.

    Args:
        adapter: the trained adapter.
        progress: what to tell how far the work is.
        **options: by name:

    Raises:
        UsageError, InputError, HubError, ResourceError: see `basiscli.errors`.
    """
    return run(ExpandOptions.of(adapter=adapter, **options), progress or Silent())


def run(options: ExpandOptions, progress: Progress) -> ExpandResult:
    """Do what the options ask for."""
    adapter, initial, base = options.adapter, options.initial, options.base
    output, overwrite = options.output, options.overwrite
    source = resolve(adapter)
    if not source.is_adapter:
        raise InputError("not an adapter", file=source.path, remedy="give a PEFT LoRA folder")
    name = source.label.rpartition("/")[2].partition("@")[0]
    if is_nola(source):
        if initial is not None:
            raise UsageError("a NOLA adapter begins at zero", file=source.path, remedy="leave out --initial")
        if base is None:
            return _random_to_lora(source, Path(output or f"{name}-lora"), overwrite)
    if initial is not None:
        start = resolve(str(initial))
        if not start.is_adapter:
            raise InputError("not an adapter", file=start.path, remedy="give the adapter that `basis init` made")
        to_lora = _values_to_lora if is_tinylora(source) else _to_lora
        return to_lora(source, start, base, Path(output or f"{name}-lora"), overwrite)
    if is_tinylora(source):
        raise UsageError(
            "which trained values are whose, only the adapter says that their training began with",
            remedy="give it with --initial, for plain LoRA of the original model",
        )
    done = merge(
        [adapter],
        method="task_arithmetic",
        parameters={"lambda": 1.0},
        base=base,
        output=output or f"{name}-merged",
        overwrite=overwrite,
        progress=progress,
    )
    return ExpandResult(done.path, "checkpoint", done.report.weights_digest, len(Adapter(source).modules))


def _to_lora(trained: Source, initial: Source, base: str | Path | None, out: Path, overwrite: bool) -> ExpandResult:
    """Write s(BA − B₀A₀) as plain LoRA."""
    new, old = Adapter(trained), Adapter(initial)
    with closing(new.weights), closing(old.weights):
        _check_pair(new, old)
        place = output_place(out, [trained, initial], overwrite=overwrite)
        config = _config(new, _base_name(initial, base))
        found = _write(place, config, lambda read: _tensors(new, old, read=read), overwrite=overwrite)
    return ExpandResult(place, "adapter", found, len(new.modules))


def _random_to_lora(source: Source, out: Path, overwrite: bool) -> ExpandResult:
    """Write the factors that seed and coefficients stand for, in float32."""
    adapter = Adapter(source)
    parts = adapter.parts
    with closing(adapter.weights):
        place = output_place(out, [source], overwrite=overwrite)

        def tensors(read: bool) -> Planned:
            for name, stored in parts.tensors.items():
                spec = TensorSpec(name, stored.dtype, stored.shape)
                yield spec, parts.read(name).contiguous() if read else None

        found = _write(place, adapter.config, tensors, overwrite=overwrite)
    return ExpandResult(place, "adapter", found, len(adapter.modules))


def _write(place: Path, config: dict[str, Any], tensors: Tensors, *, overwrite: bool) -> str:
    """Write an adapter; return the digest of its weights."""
    specs = [spec for spec, _ in tensors(False)]
    layout = Layout.plan(specs, 1 << 62, single_file=ADAPTER_FILE)
    check_disk(place, layout.nbytes)
    output = PartialOutput(place, layout, digest([json.dumps(config).encode()]), resume=False)
    try:
        written = {}
        for spec, tensor in tensors(True):
            assert tensor is not None
            written[spec.name] = digest([output.write(spec.name, tensor)])
        files = {ADAPTER_CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()}
        files["README.md"] = expanded_card(config, place.name)
        output.commit(files, overwrite=overwrite)
    except InputError:
        output.discard()
        raise
    finally:
        output.close()
    return weights_digest(specs, written)


def _values_to_lora(
    trained: Source, initial: Source, base: str | Path | None, out: Path, overwrite: bool
) -> ExpandResult:
    """Write B diag(v − σ) A as plain LoRA: nothing but the values changed, so that the rank stays as it is."""
    new, old = TrainedValues(trained), TrainedValues(initial)
    with closing(new.weights), closing(old.weights):
        place_of = _places(old)
        if new.modules.keys() != old.modules.keys() or new.rank != old.rank:
            raise InputError(
                "the two adapters have other modules or ranks",
                file=initial.path,
                remedy="give the adapter that this training began with",
            )
        place = output_place(out, [trained, initial], overwrite=overwrite)
        config = {
            "peft_type": "LORA",
            "task_type": new.config.get("task_type"),
            "base_model_name_or_path": _base_name(initial, base),
            "target_modules": list(new.modules),
            "r": new.rank,
            "lora_alpha": new.rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": bool(new.config.get("fan_in_fan_out")),
            "init_lora_weights": True,
            "inference_mode": True,
        }
        found = _write(place, config, lambda read: _value_tensors(new, old, place_of, read=read), overwrite=overwrite)
    return ExpandResult(place, "adapter", found, len(new.modules))


def _places(initial: TrainedValues) -> dict[str, int]:
    """Return the number of each module's values: the report of the initialisation has the modules in that order."""
    folder = initial.source.path
    report = read_report(folder)
    known = {tensor.name: tensor.sha256 for tensor in report.tensors} if report else {}
    modules = list(report.adapter.modules) if report and report.adapter else []
    fits = {*modules} == initial.modules.keys()
    if not fits or any(stored_digest(initial.weights.tensors[v]) != known.get(v) for v in initial.values):
        raise InputError(
            "the adapter is not as `basis init` wrote it, or its report is not with it",
            file=folder,
            remedy="give the adapter that this training began with, with its basis_report.json",
        )
    return {module: place for place, module in enumerate(modules)}


def _value_tensors(
    new: TrainedValues, old: TrainedValues, place_of: dict[str, int], *, read: bool
) -> Iterator[tuple[TensorSpec, Tensor | None]]:
    """Yield A and B diag(v − σ) of every module; without reading, only what they will be."""
    for module, stored in new.modules.items():
        factors: tuple[Tensor | None, Tensor | None] = None, None
        if read:
            its, number = old.modules[module], place_of[module]
            a = _unchanged(new, stored.a, old.weights.read(its.a))
            b = _unchanged(new, stored.b, old.weights.read(its.b))
            _unchanged(new, stored.p, selectors(new.rank))
            change = new.weights.read(new.values[number]).double() - old.weights.read(old.values[number]).double()
            factors = a, (b.double() * change).to(b.dtype)
        for part, name, factor in zip("AB", (stored.a, stored.b), factors, strict=True):
            spec = new.weights.tensors[name]
            yield TensorSpec(f"base_model.model.{module}.lora_{part}.weight", spec.dtype, spec.shape), factor


def _unchanged(new: TrainedValues, name: str, start: Tensor) -> Tensor:
    """Return a tensor of a trained adapter that must be what its training began with, in whatever dtype."""
    found = new.weights.read(name)
    if found.shape != start.shape or not bool((found.double() == start.double()).all()):
        raise InputError(
            "more than the values differs from the start",
            file=new.source.path,
            tensor=name,
            remedy="give the adapter that this training began with",
        )
    return found


def _tensors(new: Adapter, old: Adapter, *, read: bool) -> Iterator[tuple[TensorSpec, Tensor | None]]:
    """Yield every tensor of the result, in the trained adapter's order; without reading, only what it will be."""
    starts = {stored: place for place in new.modules.values() for stored in (place.a, place.b)}
    first = {place.a: old.modules[m].a for m, place in new.modules.items()}
    first |= {place.b: old.modules[m].b for m, place in new.modules.items()}
    for name, stored in new.weights.tensors.items():
        if name not in starts:
            yield TensorSpec(name, stored.dtype, stored.shape), new.weights.read(name) if read else None
            continue
        axis = 0 if name == starts[name].a else 1
        shape = list(stored.shape)
        shape[axis] *= 2
        tensor = None
        if read:
            import torch

            own = new.weights.read(name)
            start = old.weights.read(first[name]).to(own.dtype)
            tensor = torch.cat([own, start if axis == 0 else -start], axis)
        yield TensorSpec(name, stored.dtype, tuple(shape)), tensor


def _check_pair(new: Adapter, old: Adapter) -> None:
    """Refuse adapters that are not a training's end and beginning."""
    if new.bias_deltas:
        raise InputError("the adapter trains biases of its factors", file=new.source.path, remedy="merge it instead")
    for module in sorted(new.modules.keys() ^ old.modules.keys()):
        raise InputError(
            f"only one of the two adapters has {module}",
            file=old.source.path,
            remedy="give the adapter that this training began with",
        )
    for module, place in new.modules.items():
        start = old.modules[module]
        if place.embedding or place.scaling != start.scaling:
            what = "an embedding's factors" if place.embedding else f"scaling {place.scaling:g} and {start.scaling:g}"
            raise InputError(f"{module}: {what}", file=new.source.path, remedy="give the adapter it began with")
        for mine, its in ((place.a, start.a), (place.b, start.b)):
            one, other = new.weights.tensors[mine], old.weights.tensors[its]
            if one.shape != other.shape:
                raise InputError(
                    f"shapes differ: {list(one.shape)} trained, {list(other.shape)} at the start",
                    file=old.source.path,
                    tensor=its,
                    remedy="give the adapter that this training began with",
                )
            if one.dtype not in (other.dtype, "F32"):
                raise InputError(
                    f"the start is stored in {other.dtype}, the trained adapter in {one.dtype}: rounding it would "
                    "change what it subtracts",
                    file=new.source.path,
                    tensor=mine,
                    remedy="save the trained adapter in float32, or as the start is stored",
                )


def _config(new: Adapter, base: str | None) -> dict[str, Any]:
    """Return the config of twice the rank and the same scaling: alpha grows by 2, with rsLoRA by √2."""
    factor = math.sqrt(2) if new.config.get("use_rslora") else 2
    alphas = {key: value * factor for key, value in (new.config.get("alpha_pattern") or {}).items()}
    ranks = {key: value * 2 for key, value in (new.config.get("rank_pattern") or {}).items()}
    return new.config | {
        "r": new.config.get("r", 8) * 2,
        "lora_alpha": new.config.get("lora_alpha", 8) * factor,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "init_lora_weights": True,
        "base_model_name_or_path": base,
        "inference_mode": True,
    }


def _base_name(initial: Source, base: str | Path | None) -> str:
    """Return the original model's name: as given, or as the report of its initialisation has it."""
    if base is not None:
        return str(base)
    report = read_report(initial.path)
    if report is None or report.command != "init":
        raise UsageError(
            "which model the initial adapter was made from is not known",
            remedy="say it with --base: its name is written into the result",
        )
    source = report.sources[0]
    return source.repo_id or str(Path(source.spec).resolve() if Path(source.spec).exists() else source.spec)
