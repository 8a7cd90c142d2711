"""A merge's part of its report: the task vectors of whole models, and what changed in each layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from basiscli.reports.blocks import Block, HeatMap, Section, table_of
from basiscli.reports.contribution import Contribution
from basiscli.reports.evaluations import EvaluationRecord
from basiscli.reports.layers import layer_grid
from basiscli.reports.schema import Report, TaskVectorRecord, TensorRecord
from basiscli.reports.words import label, labels, models_of

_MOST_MODELS = 24  # in a matrix of cosines


def contribute(report: Report, evaluations: Sequence[EvaluationRecord] = ()) -> Contribution:
    """Return the parts of a report that only `basis merge` has: summary, tiles, task vectors, layer by layer."""
    vectors = report.task_vectors
    return Contribution(
        summary=_summary(report),
        tiles=() if vectors is None else _tiles(vectors, report.numbers.get("lambda")),
        sections=(
            Section("task-vectors", "Task vectors", () if vectors is None else _task_vectors(report, vectors)),
            Section("layers", "Layer by layer", tuple(layer_figures(report.tensors))),
        ),
    )


def layer_figures(tensors: Sequence[TensorRecord]) -> Iterator[HeatMap]:
    """Yield heat maps over layers and modules: relative change, cosines between models, directions `ortho` closed."""
    matrices = [tensor for tensor in tensors if len(tensor.shape) > 1 and tensor.norms is not None]
    cosines = {t.name: mean for t in matrices if (mean := _mean_cosine(t.cosines or [])) is not None}
    closed = {t.name: float(t.r[-1]) for t in matrices if t.r}
    grids = (
        _changes(matrices),
        layer_grid(
            cosines, "Cosines between the models' task vectors of each matrix, mean over pairs", "cosine", form=".2f",
            scale="diverging",
        ),
        layer_grid(closed, "Singular directions that were closed to the last model", "directions", form=".0f"),
    )  # fmt: skip
    yield from (grid for grid in grids if grid is not None)


def _summary(report: Report) -> str:
    names = {role: [label(s) for s in report.sources if s.role == role] for role in ("base", "model", "onto")}
    more = f", added to {names['onto'][0]}" if names["onto"] else ""
    base = f" on the base {names['base'][0]}" if names["base"] else ""
    count = "One model was" if len(names["model"]) == 1 else f"{len(names['model'])} models were"
    return f"{count} merged by {report.method.name}{base}{more}: {models_of(report.sources)}."


def _tiles(vectors: TaskVectorRecord, lambda_: float | None) -> tuple[tuple[str, str], ...]:
    norm = ("norm of the merged task vector", f"{vectors.merged_norm:.4g}")
    return (norm,) if lambda_ is None else (norm, ("λ", f"{lambda_:.4g}"))


def _task_vectors(report: Report, vectors: TaskVectorRecord) -> tuple[Block, ...]:
    names = labels([source for source in report.sources if source.role != "base"])
    rows = [[name, f"{norm:.4g}"] for name, norm in zip(names, vectors.norms, strict=False)]
    rows.append(["merged", f"{vectors.merged_norm:.4g}"])
    norms = table_of("Frobenius norms over the whole model", ["task vector", "norm"], rows, code={0}, right={1})
    return (norms, *_cosines(names, vectors))


def _cosines(names: Sequence[str], vectors: TaskVectorRecord) -> Iterator[HeatMap]:
    """Yield the cosines between the task vectors of whole models, unless there are too many to be read."""
    values = tuple(tuple(_finite(value) for value in row) for row in vectors.cosines)
    if 1 < len(values) <= _MOST_MODELS and any(value is not None for row in values for value in row):
        caption = "Cosines between the task vectors of whole models: near 0, the models learned different things"
        yield HeatMap(
            caption, tuple(names), tuple(names), values, "cosine", across="model", form=".3f", scale="diverging"
        )


def _changes(matrices: Sequence[TensorRecord]) -> HeatMap | None:
    """Return how much each matrix changed, in percent of the base's norm where that is known."""
    change = {t.name: t.merged_norm / t.base_norm for t in matrices if t.merged_norm is not None and t.base_norm}
    if not change:
        norms = {t.name: t.merged_norm for t in matrices if t.merged_norm is not None}
        return layer_grid(norms, "Norm of the merged task vector of each matrix", "norm")
    return layer_grid(
        {name: 100 * value for name, value in change.items()},
        "How much each matrix changed: norm of the merged task vector in percent of the base's norm",
        "change, %",
        form=".2f",
    )


def _mean_cosine(cosines: Sequence[Sequence[float | None]]) -> float | None:
    values = [value for i, row in enumerate(cosines) for value in row[:i] if value is not None]
    return math.fsum(values) / len(values) if values else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
