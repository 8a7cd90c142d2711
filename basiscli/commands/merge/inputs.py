"""The inputs of a merge: how many, their base, their weights, and the history of a merge to continue."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import BaseModel

from basiscli.checkpoints.files import REPORT
from basiscli.checkpoints.source import Source, is_hub_id
from basiscli.checkpoints.views import Checkpoint
from basiscli.errors import InputError, UsageError
from basiscli.hub.resolve import resolve, resolve_base
from basiscli.reports.schema import Continuation, read_report
from basiscli.transforms import History, Method


def check_count(method: Method, count: int) -> None:
    """Raise if a method does not merge this number of models, the base not counted.

    Raises:
        UsageError: too few or too many.
    """
    fewest, most = method.models
    if count < 2 and method.models == (2, None) and not method.needs_base:
        raise UsageError("nothing to merge", remedy="give two models or more")
    if count < fewest or (most is not None and count > most):
        wanted = f"{fewest}" if most == fewest else f"{fewest} or more" if most is None else f"{fewest} to {most}"
        beside = " beside the base" if method.needs_base else ""
        raise UsageError(
            f"{method.name} merges {wanted} model{'' if wanted == '1' else 's'}{beside}, and {count} are given",
            remedy=f"`basis methods show {method.name}` says what it does",
        )


def find_base(
    given: str | None, inputs: list[Source], named_by: list[Source], method: Method, *, headers_only: bool = False
) -> Checkpoint | None:
    """Return the opened base model: the one given, else the one that all inputs name, None if none is needed.

    Args:
        given: a folder or a Hub id; None for the one that the inputs name.
        inputs: the models and adapters; an adapter needs a base whatever the method does.
        named_by: those of the inputs whose adapter_config.json or model card is searched for the base's name.
        method: of the merge.
        headers_only: fetch only the headers of a model on the Hub.

    Raises:
        InputError: an adapter of another base.
        UsageError: the inputs name no base, or several.
    """
    if given is not None:
        source = resolve(given, headers_only=headers_only)
        for adapter in (s for s in inputs if s.is_adapter):
            named = adapter.base_model or ""
            if source.repo_id and is_hub_id(named) and named.lower() != source.repo_id.lower():
                raise InputError(
                    f"the adapter's base is {named}, not {source.repo_id}",
                    file=adapter.path,
                    remedy="give the base that it was trained on; a local path to the same weights is taken as it is",
                )
        return Checkpoint.open(source)
    if not method.needs_base and not any(source.is_adapter for source in inputs):
        return None
    names = {source.spec: source.base_model for source in named_by}
    silent = [spec for spec, name in names.items() if name is None]
    if silent:
        raise UsageError(
            f"{method.name} needs the base, and {', '.join(silent)} does not name one",
            remedy="give it with --base (or name it as base_model in their README.md)",
        )
    if len({name.lower() for name in names.values() if name}) > 1:
        listing = ", ".join(f"{spec}: {name}" for spec, name in names.items())
        raise UsageError(f"the inputs name different bases ({listing})", remedy="give the right one with --base")
    namer = named_by[0]
    assert namer.base_model is not None
    return Checkpoint.open(resolve_base(namer.base_model, namer, headers_only=headers_only))


def merge_weights(
    method: Method, values: BaseModel, onto: Source | None, given: Sequence[float] | None, count: int
) -> tuple[History | None, list[float]]:
    """Return the recorded history of the merge to continue, and one weight per model (the continued result's first).

    Raises:
        UsageError: weights that the method does not take, that are too few or too many, or that sum to zero.
        InputError: the earlier merge recorded nothing that can be continued.
    """
    if given is not None and "weights" not in method.wants:
        raise UsageError(f"{method.name} takes no weights", remedy="leave out --weights")
    weights = list(given) if given is not None else [1.0] * count
    if len(weights) != count:
        raise UsageError(f"{len(weights)} weights for {count} models", remedy="give --weights one number a model")
    history = None
    if onto is not None:
        history, first = _history(onto, method)
        weights = [first, *weights]
    if not all(math.isfinite(weight) for weight in weights):
        raise UsageError(f"weights that are no finite numbers: {weights}", remedy="give --weights finite numbers")
    check_weights(method, values, weights)
    return history, weights


def check_weights(method: Method, values: BaseModel, weights: Sequence[float]) -> None:
    """Raise if weights sum to zero and the method would normalise them.

    Raises:
        UsageError: they do.
    """
    # What is left of 0.1 + 0.2 − 0.3 is rounding; dividing by it would multiply the models by 10¹⁶.
    cancels = abs(math.fsum(weights)) <= 1e-12 * math.fsum(map(abs, weights))
    if "weights" in method.wants and getattr(values, "normalize", False) and cancels:
        raise UsageError("the weights sum to zero and cannot be normalised", remedy="normalize=false")


def _history(onto: Source, method: Method) -> tuple[History, float]:
    """Return what an earlier merge recorded, and the weight its result takes as the first model."""
    if method.onto_weight is None:
        raise UsageError(f"{method.name} cannot be continued with --onto", remedy="merge all models at once")
    record = _continuation(onto, method)
    history = History(record.method, record.parameters, record.weights, record.numbers)
    try:
        return history, method.onto_weight(history)
    except (ZeroDivisionError, KeyError) as error:
        raise InputError(
            "the earlier merge recorded nothing that can be continued",
            file=onto.folder / REPORT,
            remedy="merge all models at once",
        ) from error


def _continuation(onto: Source, method: Method) -> Continuation:
    report = read_report(onto.folder)
    record = report.continuation if report else None
    if record is None:
        raise InputError(
            f"{onto.spec} has no {REPORT} of a merge that can be continued",
            file=onto.folder,
            remedy="give the output folder of an earlier `basis merge`",
        )
    if record.method != method.name:
        raise InputError(
            f"{onto.spec} was merged by {record.method}, not by {method.name}",
            file=onto.folder / REPORT,
            remedy=f"--method {record.method}",
        )
    return record
