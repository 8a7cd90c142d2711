"""The plan of a merge: every output tensor with its memory and cost, checked before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from basiscli.checkpoints.adapter import Adapter
from basiscli.checkpoints.adapter_view import AdapterView, Model
from basiscli.checkpoints.dtypes import tensor_bytes
from basiscli.checkpoints.files import ADAPTER_FILE
from basiscli.checkpoints.header import TensorSpec
from basiscli.checkpoints.layout import Layout
from basiscli.checkpoints.source import Source
from basiscli.checkpoints.views import Checkpoint
from basiscli.commands.merge.as_adapter import adapter_tensors
from basiscli.commands.merge.compatibility import check_architecture, common_dtype_notes, sort_tensors
from basiscli.commands.merge.inputs import check_count, find_base, merge_weights
from basiscli.commands.merge.price import merge_price
from basiscli.commands.merge.recipe import RECIPE, Choice, FromRecipe
from basiscli.engine.output_folder import check_disk, output_folder
from basiscli.engine.partial import fingerprint_of
from basiscli.engine.pricing import Price
from basiscli.engine.rates import MEASURED, Rates
from basiscli.engine.settings import Settings
from basiscli.engine.threads import peak_workspace
from basiscli.hub.resolve import resolve
from basiscli.model.adapted import adapted
from basiscli.model.architecture import kind_by_name
from basiscli.names import natural_key
from basiscli.transforms import Choices, History, Kind, Method
from basiscli.transforms.per_model import check_lengths

BLOCK_ELEMENTS = 1 << 19  # of one model, read and merged at a time: 2 MB in float32
GPU_BLOCK_ELEMENTS = 1 << 22  # there a step costs its launch, and Python's, rather than its elements
KEPT_BYTES = 1 << 27  # of all models together: a tensor up to this size is read once however often it is gone over


@dataclass(frozen=True)
class MergePlan:
    """A merge that is checked and ready to run: opened inputs, output tensors and cost, from headers alone."""

    out: Path
    """The output folder."""
    method: Method
    values: BaseModel
    """The method's parameters."""
    models: list[Model]
    """In order; when an earlier merge is continued, its result is the first."""
    weights: list[float]
    base: Checkpoint | None
    history: History | None
    merged: list[str]
    """Names of the tensors that the method merges."""
    copied: list[str]
    """Names of the tensors copied from the reference: buffers and integers."""
    layout: Layout
    adapter_rank: int | None
    """The rank of the adapter to write; None for a full checkpoint."""
    notes: list[str]
    settings: Settings
    recipe: FromRecipe | None = None
    untied: bool = False  # whether an output head that the reference ties is written on its own

    def choice(self, name: str) -> Choice:
        """Return the method's parameters and the weights for one tensor."""
        return (self.values, self.weights) if self.recipe is None else self.recipe.choices(name)

    @property
    def parameters(self) -> dict[str, Any]:
        """The method's parameters as plain data; those that a recipe gives several values stand as 'recipe.yaml'."""
        found = self.values.model_dump(mode="json")
        distinct = {id(values): values for values, _ in map(self.choice, self.merged)}
        for name in found:
            if any(getattr(values, name) != getattr(self.values, name) for values in distinct.values()):
                found[name] = RECIPE
        return found

    @property
    def reference(self) -> Checkpoint:
        """The base, else the first model: it gives the result's names, shapes, dtypes and configuration."""
        first = self.models[0]
        return self.base or (first if isinstance(first, Checkpoint) else first.base)

    @property
    def views(self) -> list[AdapterView]:
        """The models that are adapters."""
        return [model for model in self.models if isinstance(model, AdapterView)]

    @property
    def earlier(self) -> int:
        """With `--onto`, how many models are merged in the first of `models`; else 0."""
        return self.history.models if self.history else 0

    @property
    def two_passes(self) -> bool:
        """Whether every tensor needs a number over the whole model (`TaskVectorMerge.scale`), and so a second pass."""
        return self.method.keeps_factors

    @property
    def read_bytes(self) -> int:
        """Bytes read from the inputs."""
        names = [*self.merged, *self.copied]
        total = 0
        for model in [self.reference, *self.models]:
            owner = model.adapter.weights.tensors.values() if isinstance(model, AdapterView) else None
            total += sum(t.nbytes for t in owner) if owner is not None else _bytes_of(model, names)
        if self.base is None:
            total -= _bytes_of(self.reference, names)
        # Whole task vectors are read once more for their statistics, and the base once more to add to.
        return total * 2 if self.two_passes else total

    @property
    def scratch_bytes(self) -> int:
        """Bytes of intermediate results on disk: merged task vectors between the two passes."""
        if not self.two_passes or self.adapter_rank is not None:
            return 0
        dense = [n for n in self.merged if any(not _stays_low_rank(model, n) for model in self.models)]
        return sum(tensor_bytes("F32", self.reference.tensors[name].shape) for name in dense)

    @property
    def write_bytes(self) -> int:
        """Bytes of the output's weights."""
        return self.layout.nbytes

    @property
    def peak_bytes(self) -> int:
        """Bytes of memory for tensors at most; the interpreter and torch come on top."""
        names = [*self.merged, *self.copied]
        return peak_workspace([workspace(self, name) for name in names], self.settings.workers, self.settings.memory)

    def price(self, rates: Rates = MEASURED) -> Price:
        """Return the estimated cost in bytes, operations and seconds at these rates."""
        return merge_price(self, partial(workspace, self), rates)

    @property
    def fingerprint(self) -> str:
        """Digest of all that the result's bytes depend on."""
        inputs = [self.reference, *self.models]
        files = [file for model in inputs for file in model.files]
        settings = self.settings
        facts = [
            self.method.name, self.values.model_dump(mode="json"), self.weights,
            self.adapter_rank, settings.device, settings.dtype, settings.seed, settings.allow_nonfinite,
            settings.allow_missing, [shard.header[0].hex() for shard in self.layout.shards],
            None if self.history is None else dict(self.history.numbers),
            None if self.recipe is None else self.recipe.facts,
        ]  # fmt: skip
        return fingerprint_of(files, facts)

    def close(self) -> None:
        """Close the inputs."""
        for model in [self.reference, *self.models, *(self.recipe.opened if self.recipe else ())]:
            model.close()


def plan_merge(
    models: Sequence[str],
    method: Method,
    parameters: Mapping[str, Any],
    *,
    base: str | None,
    onto: str | None,
    weights: Sequence[float] | None,
    out: str | Path | None,
    as_adapter: bool,
    settings: Settings,
) -> MergePlan:
    """Return the plan of a merge, from the headers of every input.

        plan = plan_merge(
            ["a", "b"], method, {"density": 0.5}, base="base", onto=None, weights=None, out="merged", as_adapter=False,
            settings=settings,
        )

    Raises:
        UsageError, InputError, HubError, ResourceError: anything wrong that shows before weights are read.
    """
    values = method.validate(parameters)
    check_count(method, len(models) + (onto is not None))
    check_lengths(method.name, values, len(models))
    sources = [resolve(spec, headers_only=settings.headers_only) for spec in models]
    onto_source = resolve(onto, headers_only=settings.headers_only) if onto else None
    history, all_weights = merge_weights(method, values, onto_source, weights, len(sources))
    if method.check is not None:
        method.check(Choices(method.name, dict(values), all_weights, history))
    inputs = [*([onto_source] if onto_source else []), *sources]
    base_checkpoint = find_base(base, inputs, sources, method, headers_only=settings.headers_only)
    opened = [_open(source, base_checkpoint) for source in inputs]
    return plan_opened(
        opened, base_checkpoint, method, (values, all_weights), history=history, out=out, as_adapter=as_adapter,
        settings=settings,
    )  # fmt: skip


def plan_opened(
    opened: list[Model],
    base: Checkpoint | None,
    method: Method,
    choice: Choice,
    *,
    out: str | Path | None,
    settings: Settings,
    history: History | None = None,
    as_adapter: bool = False,
    recipe: FromRecipe | None = None,
    notes: Sequence[str] = (),
) -> MergePlan:
    """Return the plan of a merge of opened models; arguments as the fields of `MergePlan`.

    Raises:
        UsageError, InputError, ResourceError: the models do not fit together, or the output folder cannot be used.
    """
    first = opened[0]
    reference = base or (first if isinstance(first, Checkpoint) else first.base)
    check_architecture(reference, opened, trust_remote_code=settings.trust_remote_code)
    sort = sort_tensors(reference, opened, allow_missing=settings.allow_missing)
    merged, copied = sorted(sort.merged, key=natural_key), sorted(sort.copied, key=natural_key)
    if as_adapter:
        specs, rank = adapter_tensors(opened, merged, method)
        layout = Layout.plan(specs, settings.shard_bytes, single_file=ADAPTER_FILE)
    else:
        rank = None
        outputs = [_output(reference.tensors[name], settings.dtype) for name in merged]
        outputs += [_output(reference.tensors[name], None) for name in copied]
        layout = Layout.plan(sorted(outputs, key=lambda t: natural_key(t.name)), settings.shard_bytes)
    found = [*notes, *sort.notes]
    found += common_dtype_notes(reference, opened, {n: reference.tensors[n] for n in merged})
    sources = [model.source for model in [*opened, reference]]
    sources += [source for _, source in recipe.sources] if recipe else []
    folder = output_folder(f"merge-{method.name}" if out is None else out, sources, overwrite=settings.overwrite)
    plan = MergePlan(
        folder, method, choice[0], opened, choice[1], base, history, merged, copied, layout, rank, found, settings,
        recipe, sort.untied,
    )  # fmt: skip
    check_disk(plan.out, plan.write_bytes + plan.scratch_bytes, headers_only=settings.headers_only)
    return plan


def block_elements(device_type: str) -> int:
    """Return the elements of one model that are merged at a time on a device type ('cpu', 'cuda')."""
    return GPU_BLOCK_ELEMENTS if device_type == "cuda" else BLOCK_ELEMENTS


def workspace(plan: MergePlan, name: str, block: int = BLOCK_ELEMENTS) -> int:
    """Return the bytes of memory that merging one tensor takes at most; `block` is in elements of one model."""
    tensor = plan.reference.tensors[name]
    count, models = tensor.count, len(plan.models)
    if is_decomposed(plan, name):
        side = min(tensor.shape) if len(tensor.shape) == 2 else 0
        # S, T, U and the result in float32; SᵀS, its eigenvectors and LAPACK's workspace in float64.
        return 16 * count + 6 * 8 * side * side
    if plan.two_passes or plan.method.elementwise or (plan.method.rowwise and len(tensor.shape) > 1):
        row = count // max(1, tensor.shape[0]) if tensor.shape else 1
        elements = min(count, max(block, row))
    else:
        elements = count
    kept = kept_bytes(plan, name)
    # A method's own steps make about as much again; what ranks or measures, int64 keys and masks beside them.
    return (kept if kept <= KEPT_BYTES else 0) + 4 * elements * (2 * models + (4 if plan.method.measure is None else 8))


def is_decomposed(plan: MergePlan, name: str) -> bool:
    """Return whether the method decomposes a tensor's task vectors as whole matrices, judging by the tensor's name."""
    is_matrix = kind_by_name(plan.reference.tensors[name]) in {Kind.LINEAR, None}
    return plan.two_passes and is_matrix and any(not _stays_low_rank(model, name) for model in plan.models)


def kept_bytes(plan: MergePlan, name: str) -> int:
    """Return a tensor's float32 bytes over all models where the method reads it several times (`measure`), else 0."""
    if plan.method.measure is None:
        return 0
    return 4 * plan.reference.tensors[name].count * (len(plan.models) + (plan.base is not None))


def _bytes_of(model: Checkpoint | AdapterView, names: Sequence[str]) -> int:
    return sum(model.tensors[name].nbytes for name in names if name in model.tensors)


def _stays_low_rank(model: Model, name: str) -> bool:
    return isinstance(model, AdapterView) and model.is_low_rank(name)


def _output(tensor: TensorSpec, dtype: str | None) -> TensorSpec:
    return TensorSpec(tensor.name, dtype or tensor.dtype, tensor.shape)


def _open(source: Source, base: Checkpoint | None) -> Model:
    if not source.is_adapter:
        return Checkpoint.open(source)
    assert base is not None  # find_base sees to it that adapters have one
    return adapted(Adapter(source), base)
