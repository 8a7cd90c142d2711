"""The figures that a report's numbers give; each function returns none where there is nothing to show."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from basiscli.reports.blocks import Curves, HeatMap, Series
from basiscli.reports.evaluations import EvaluationRecord
from basiscli.reports.layers import layer_grid, place_of
from basiscli.reports.schema import AdapterRecord, KVRecord, Report, TensorRecord

_MOST_MODELS = 24  # in a matrix of cosines
_MOST_HEADS = 8
_MOST_KINDS = 8


def layer_figures(report: Report) -> Iterator[HeatMap]:
    """Yield what was done to each layer: changes and cosines, ranks and energies, ranks of the KV cache."""
    grids = _merge_grids(report.tensors)
    if report.adapter is not None:
        grids = _adapter_grids(report.adapter)
    yield from (grid for grid in grids if grid is not None)
    if report.kv is not None:
        yield _kv_ranks(report.kv)


def cosine_matrix(names: Sequence[str], cosines: Sequence[Sequence[float | None]]) -> Iterator[HeatMap]:
    """Yield the cosines between the task vectors of whole models."""
    values = tuple(tuple(_finite(value) for value in row) for row in cosines)
    if 1 < len(values) <= _MOST_MODELS and any(value is not None for row in values for value in row):
        caption = "Cosines between the task vectors of whole models: near 0, the models learned different things"
        yield HeatMap(
            caption, tuple(names), tuple(names), values, "cosine", across="model", form=".3f", scale="diverging"
        )


def spectra(report: Report) -> Iterator[Curves]:
    """Yield the falling singular values of factors, and the energy that columns of KV bases hold."""
    if report.adapter is not None:
        yield from _adapter_spectra(report.adapter)
    if report.kv is not None and report.kv.key_energy and report.kv.value_energy:
        both = (("keys", report.kv.key_energy), ("values", report.kv.value_energy))
        series = [Series(name, tuple(range(1, len(e) + 1)), tuple(_running_sum(e))) for name, e in both]
        caption = "Energy that the first columns of a basis hold: mean over layers and KV heads"
        yield Curves(caption, "columns kept", "share of the energy", tuple(series))


def loss_curve(report: Report) -> Iterator[Curves]:
    """Yield the loss over the training."""
    losses = [] if report.kv is None else [value for value in report.kv.losses if math.isfinite(value)]
    if report.kv is not None and len(losses) > 1:
        steps = tuple(round((n + 0.5) * report.kv.trained_steps / len(losses)) for n in range(len(losses)))
        # Every step draws other ranks, so single values jump about.
        width = max(1, len(losses) // 10)
        parts = [losses[max(0, n - width + 1) : n + 1] for n in range(len(losses))]
        mean = tuple(math.fsum(part) / len(part) for part in parts)
        series = [Series("loss", steps, tuple(losses))]
        series += [Series(f"mean of {width}", steps, mean)] if width > 1 else []
        caption = f"Loss over {report.kv.trained_steps:,} steps on {report.kv.trained_tokens:,} tokens"
        yield Curves(caption, "step", "loss", tuple(series))


def ratio_curve(report: Report, evaluations: Sequence[EvaluationRecord]) -> Iterator[Curves]:
    """Yield perplexity by the removed share of the cache, where two or more evaluations are of the same text."""
    if report.kv is None or not evaluations:
        return
    text = (evaluations[0].text, evaluations[0].tokens)
    points: dict[float, float] = {}
    for one in evaluations:
        if (one.text, one.tokens) == text and one.against is not None and one.against.cache_bytes_per_token:
            kept = one.model.cache_bytes_per_token / one.against.cache_bytes_per_token
            points |= {0.0: one.against.perplexity, 100 * (1 - kept): one.model.perplexity}
    found = sorted((x, y) for x, y in points.items() if math.isfinite(y) and y > 0)
    if len(found) > 2:
        series = Series("compressed", tuple(x for x, _ in found), tuple(y for _, y in found))
        dense = Series("dense", (found[0][0], found[-1][0]), (points[0.0],) * 2)
        caption = f"Perplexity by the removed share of the KV cache, {text[1]:,} tokens of {text[0]}"
        steep = max(series.y) > 5 * min(series.y)
        yield Curves(caption, "removed share of the cache, %", "perplexity", (series, dense), log=steep)


def _merge_grids(tensors: Sequence[TensorRecord]) -> Iterator[HeatMap | None]:
    matrices = [tensor for tensor in tensors if len(tensor.shape) > 1 and tensor.norms is not None]
    change = {t.name: t.merged_norm / t.base_norm for t in matrices if t.merged_norm is not None and t.base_norm}
    if change:
        yield layer_grid(
            {name: 100 * value for name, value in change.items()},
            "How much each matrix changed: norm of the merged task vector in percent of the base's norm",
            "change, %", form=".2f",
        )  # fmt: skip
    else:
        norms = {t.name: t.merged_norm for t in matrices if t.merged_norm is not None}
        yield layer_grid(norms, "Norm of the merged task vector of each matrix", "norm")
    shared = {t.name: mean for t in matrices if (mean := _mean_cosine(t.cosines or [])) is not None}
    yield layer_grid(
        shared, "Cosines between the models' task vectors of each matrix, mean over pairs", "cosine", form=".2f",
        scale="diverging",
    )  # fmt: skip
    closed = {t.name: float(t.r[-1]) for t in matrices if t.r}
    yield layer_grid(closed, "Singular directions that were closed to the last model", "directions", form=".0f")


def _adapter_grids(adapter: AdapterRecord) -> Iterator[HeatMap | None]:
    modules = adapter.modules
    ranks = {name: float(module.rank) for name, module in modules.items()}
    if len(set(ranks.values())) > 1:
        yield rank_grid(ranks)
    energy = {name: 100 * module.energy for name, module in modules.items() if module.rank}
    if any(energy.values()):
        of = (
            "the weight's squared norm" if any(m.norm is not None for m in modules.values()) else "its inputs' variance"
        )
        yield layer_grid(energy, f"Share of {of} that a module's factors hold, in percent", "energy, %", form=".1f")
    nf4 = {
        n: 100 * (1 - m.nf4_error / m.nf4_error_qlora) for n, m in modules.items() if m.nf4_error and m.nf4_error_qlora
    }
    yield layer_grid(nf4, "How much of the error of NF4 the factors take up, in percent", "less error, %", form=".1f")


def rank_grid(ranks: Mapping[str, float]) -> HeatMap:
    """Return the rank of every module by layer."""
    grid = layer_grid(ranks, "Rank of every module by layer", "rank", form=".0f")
    assert grid is not None  # ranks are finite
    return grid


def _kv_ranks(kv: KVRecord) -> HeatMap:
    rows: dict[str, list[float]] = {}
    for what, ranks in (("keys", kv.key_ranks), ("values", kv.value_ranks)):
        heads = len(ranks[0]) if ranks else 0
        if heads > _MOST_HEADS:
            rows[f"{what}, mean of {heads} heads"] = [sum(layer) / len(layer) for layer in ranks]
        else:
            rows |= {f"{what}, head {n}": [float(layer[n]) for layer in ranks] for n in range(heads)}
    layers = tuple(str(number) for number in range(len(kv.key_ranks)))
    caption = f"Dimensions kept of {kv.head_dim}, for each layer and KV head"
    return HeatMap(caption, tuple(rows), layers, tuple(map(tuple, rows.values())), "dimensions", form=".0f")


def _adapter_spectra(adapter: AdapterRecord) -> Iterator[Curves]:
    kinds: dict[str, list[list[float]]] = {}
    relative = all(module.norm is not None for module in adapter.modules.values())
    for name, module in adapter.modules.items():
        whole = (module.norm or 0.0) if relative else 1.0
        if module.spectrum and whole > 0:
            kinds.setdefault(place_of(name)[1], []).append([value / whole for value in module.spectrum])
    series = []
    for kind, found in list(kinds.items())[:_MOST_KINDS]:
        longest = max(map(len, found))
        columns = [[one[n] for one in found if n < len(one)] for n in range(longest)]
        means = tuple(math.fsum(column) / len(column) for column in columns)
        series.append(Series(kind, tuple(range(1, longest + 1)), means))
    if series and max(len(one.x) for one in series) > 1:
        up = "σ / norm of the weight" if relative else "share of the inputs' variance"
        caption = (
            "Singular values of what the factors hold" if relative else "Variance of the inputs along each direction"
        )
        values = [value for one in series for value in one.y]
        steep = 0 < 5 * min(values) < max(values)
        yield Curves(f"{caption}: mean over the layers", "direction", up, tuple(series), log=steep)


def _mean_cosine(cosines: Sequence[Sequence[float | None]]) -> float | None:
    values = [value for i, row in enumerate(cosines) for value in row[:i] if value is not None]
    return math.fsum(values) / len(values) if values else None


def _running_sum(values: Sequence[float]) -> list[float]:
    return [math.fsum(values[: n + 1]) for n in range(len(values))]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
