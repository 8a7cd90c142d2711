"""The plan of a merge from a recipe in mergekit's format."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from basiscli.checkpoints.adapter import Adapter
from basiscli.checkpoints.adapter_view import AdapterView, Model
from basiscli.checkpoints.digests import digest
from basiscli.checkpoints.dtypes import parse_dtype
from basiscli.checkpoints.source import Source
from basiscli.checkpoints.views import Checkpoint
from basiscli.commands.merge.api import FromRecipe, MergePlan, check_count, plan_opened
from basiscli.commands.run.mergekit import IGNORED, InputSlice, MergekitRecipe, ModelName, OutputSlice
from basiscli.commands.run.parameters import TensorParameters
from basiscli.commands.run.reading import in_recipe
from basiscli.engine.partial import fingerprint_of
from basiscli.engine.settings import Settings
from basiscli.errors import InputError
from basiscli.hub.resolve import resolve
from basiscli.model.adapted import adapted
from basiscli.model.stacked import LayerRange, layer_count, stack_layers
from basiscli.model.vocabulary import ReindexedCheckpoint, files_with_new_token_ids
from basiscli.registry import Registry
from basiscli.transforms import Method

_PAIR = (2, 2)


def plan_mergekit(
    recipe: MergekitRecipe, file: Path, registry: Registry, *, out: str | Path | None, settings: Settings
) -> MergePlan:
    """Return the plan of a recipe's merge; a `dtype` in the settings comes before the recipe's.

    Args:
        recipe: the parsed recipe.
        file: it was read from, copied into the output.
        registry: finds the merge method.
        out: folder to write; by default the recipe's name, here.
        settings: of the run.

    Raises:
        UsageError, InputError, HubError, ResourceError: anything wrong that shows before weights are read.
    """
    with in_recipe(file, "merge_method"):
        method = registry.find("merge", recipe.merge_method)
    with in_recipe(file, "dtype"):
        said = recipe.out_dtype or recipe.dtype
        dtype = parse_dtype(said) if said else None
    if method.keeps_factors:
        raise InputError(
            f"{method.name} takes one set of parameters for the whole model",
            file=file,
            remedy=f"`basis merge --method {method.name}`, or a step of a pipeline",
        )
    tokenizer = recipe.vocabulary is not None or recipe.chat_template is not None
    stored = {
        name: _open(name, file, headers_only=settings.headers_only, tokenizer=tokenizer) for name in recipe.names()
    }
    opened, files, notes = _with_vocabulary(recipe, stored, file)
    models: dict[ModelName, Model] = {
        name: checkpoint
        if name.lora is None
        else adapted(Adapter(resolve(name.lora, headers_only=settings.headers_only)), checkpoint)
        for name, checkpoint in opened.items()
    }
    parts = recipe.part.slices or [_whole(recipe, method, stored)]
    roles = [_roles(part, recipe.base_model, method, number, file) for number, part in enumerate(parts)]
    if len({len(role.others) for role in roles}) > 1:
        counts = ", ".join(str(len(role.others)) for role in roles)
        raise InputError(
            f"slices of {counts} models", file=file, remedy="as many in each: a further source may have the weight 0"
        )
    with in_recipe(file):
        check_count(method, len(roles[0].others))
    others, base = _inputs(recipe, parts, roles, models, file)
    choices = TensorParameters(recipe, method, file, parts, [role.others for role in roles])
    tensors = (others[0] if base is None else base).tensors
    for name in tensors:
        choices(name)
    ignored = sorted(IGNORED & {name for _, written in choices.written() for name in written})
    used = {source.model for part in parts for source in part.sources}
    taken = FromRecipe(
        text=file.read_text(encoding="utf-8"),
        choices=choices,
        facts=[
            choices.facts,
            {name: digest([content]) for name, content in (files or {}).items()},
            fingerprint_of([item for checkpoint in stored.values() for item in checkpoint.files], []),
        ],
        sources=_sources(models, used if recipe.vocabulary is None else set(models), recipe, method),
        files=files,
        dtype=dtype,
        opened=list(stored.values()),
    )
    return plan_opened(
        others, base, method, choices(next(iter(tensors))), out=out or file.stem,
        settings=replace(settings, dtype=settings.dtype or dtype),
        recipe=taken, notes=[*notes, *(f"{name} has no effect here" for name in ignored)],
    )  # fmt: skip


def _open(name: ModelName, file: Path, *, headers_only: bool, tokenizer: bool) -> Checkpoint:
    source = resolve(name.model, headers_only=headers_only, tokenizer=tokenizer)
    if source.is_adapter:
        raise InputError(f"{name.model} is an adapter", file=file, remedy=f"name its base, too: BASE+{name.model}")
    return Checkpoint.open(source)


def _sources(
    models: Mapping[ModelName, Model], used: Collection[ModelName], recipe: MergekitRecipe, method: Method
) -> list[tuple[Literal["base", "model"], Source]]:
    """Return what went in, adapters beside what they are on, each once."""
    found: dict[Source, Literal["base", "model"]] = {}
    for name in [name for name in models if name in used]:
        model = models[name]
        if isinstance(model, AdapterView):
            found.setdefault(model.base.source, "model")
        is_base = name == recipe.base_model and "base" in method.wants
        found[model.source] = "base" if is_base else "model"
    return [(role, source) for source, role in found.items()]


@dataclass(frozen=True)
class _Roles:
    """Which source of a slice is the base, and in which order the others go to the method."""

    base: int | None
    others: list[int]


def _roles(part: OutputSlice, base: ModelName | None, method: Method, number: int, file: Path) -> _Roles:
    base = part.base_model or base
    names = [source.model for source in part.sources]
    index = names.index(base) if base in names else None
    everyone = list(range(len(names)))
    if "base" in method.wants:
        if index is None and (method.needs_base or base is not None):
            raise InputError(
                f"{method.name} needs a base" if base is None else f"slices.{number}: the base {base} is not in it",
                file=file,
                remedy="name it as base_model, and in slices list it among the sources",
            )
        return _Roles(index, [one for one in everyone if one != index])
    if method.models == _PAIR and index is not None:  # an interpolation begins at the base
        return _Roles(None, [index, *(one for one in everyone if one != index)])
    return _Roles(None, everyone)


def _whole(recipe: MergekitRecipe, method: Method, stored: Mapping[ModelName, Checkpoint]) -> OutputSlice:
    """Return `models` as one slice of all layers; a base that is not listed joins where the method has a use for it."""
    listed = recipe.part.models or []
    # At least one layer: a model without any has its other tensors.
    depths = {name: max(1, layer_count(checkpoint)) for name, checkpoint in stored.items()}
    sources = [
        InputSlice(model=one.model, layer_range=(0, depths[one.model]), parameters=one.parameters) for one in listed
    ]
    base, has_use = recipe.base_model, "base" in method.wants or method.models == _PAIR
    if base is not None and has_use and base not in [one.model for one in listed]:
        sources.append(InputSlice(model=base, layer_range=(0, depths[base]), parameters={}))
    # Models of different depths are refused with their tensors' names, as for `basis merge`.
    return OutputSlice.model_construct(sources=sources, base_model=None, parameters={})


def _inputs(
    recipe: MergekitRecipe,
    parts: Sequence[OutputSlice],
    roles: Sequence[_Roles],
    models: Mapping[ModelName, Model],
    file: Path,
) -> tuple[list[Model], Checkpoint | None]:
    """Return the models in the method's order and the base: of slices, checkpoints made of one source of each."""

    def at(indices: Sequence[int]) -> Model:
        sources = [part.sources[index] for part, index in zip(parts, indices, strict=True)]
        if recipe.part.slices is None:
            return models[sources[0].model]
        return stack_layers([_layer_range(source, models[source.model], file) for source in sources])

    others = [at(indices) for indices in zip(*(role.others for role in roles), strict=True)]
    bases = [role.base for role in roles if role.base is not None]
    if not bases:
        return others, None
    if len(bases) < len(parts):
        raise InputError("some slices have the base and some have not", file=file, remedy="name it in each slice")
    base = at(bases)
    if isinstance(base, AdapterView):
        raise InputError(
            f"the base is an adapter on {base.base.source.spec}",
            file=file,
            remedy="write it as a checkpoint first: basis expand",
        )
    return others, base


def _layer_range(source: InputSlice, model: Model, file: Path) -> LayerRange:
    if not isinstance(model, Checkpoint) or model.is_assembled:
        raise InputError(
            f"{source.model} is no plain checkpoint: slices take layers of those",
            file=file,
            remedy="write adapters into a checkpoint first (basis expand), and leave out the tokenizer",
        )
    return LayerRange(model, *source.layer_range)


def _with_vocabulary(
    recipe: MergekitRecipe, stored: Mapping[ModelName, Checkpoint], file: Path
) -> tuple[dict[ModelName, Checkpoint], dict[str, bytes] | None, list[str]]:
    """Return the models with the vocabulary that the recipe asks for, the files that go with it, and notes."""
    choice, base = recipe.vocabulary, recipe.base_model or next(recipe.names())
    opened, notes, files = dict(stored), list[str](), dict[str, bytes]()
    if choice is None and recipe.chat_template is None:
        return opened, None, notes
    from basiscli.commands.run.tokenizer import align, chat_template, tokenizer_files
    from basiscli.runtime.load import load_tokenizer

    if choice is None:
        tokenizer: Any = load_tokenizer(stored[base].source.folder)
    else:
        aligned = align(choice, stored, recipe.base_model, file)
        tokenizer, notes = aligned.tokenizer, aligned.notes
        if aligned.rows is not None:
            opened = {name: ReindexedCheckpoint(stored[name], rows) for name, rows in aligned.rows.items()}
            notes.append(f"the models' tokens are brought to one vocabulary of {len(tokenizer)}")
            files = files_with_new_token_ids(stored[base], aligned.rows[base])
    if recipe.chat_template is not None:
        template = chat_template(recipe.chat_template, [one.source for one in stored.values()], file)
        if template is None:
            notes.append("chat_template: auto, and no model has one")
        else:
            tokenizer.chat_template = template
    return opened, files | tokenizer_files(tokenizer), notes
