"""A KV compression's part of its report: ranks, energies and training of the bases, and engines that use them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from basiscli.reports.blocks import Curves, HeatMap, Section, Series, table_of
from basiscli.reports.contribution import Contribution
from basiscli.reports.evaluations import EvaluationRecord
from basiscli.reports.schema import KVRecord, Report
from basiscli.reports.words import models_of, percent, yes_no

_MOST_HEADS = 8  # that have rows of their own


def contribute(report: Report, evaluations: Sequence[EvaluationRecord] = ()) -> Contribution:
    """Return the parts of a report that only `basis compress MODEL` has; empty for a report without `kv`."""
    kv = report.kv
    if kv is None:
        return Contribution()
    engines = [[engine, use] for engine, use in kv.engines.items()]
    return Contribution(
        summary=_summary(report, kv),
        tiles=(
            ("of the cache kept", percent(kv.kept)),
            ("cache bytes a token", f"{kv.dense_bytes_per_token:,} → {kv.bytes_per_token:,}"),
        ),
        calibration=kv.calibration,
        settings=(
            ("search", kv.search),
            ("values folded", yes_no(kv.values_folded)),
            ("training steps", str(kv.trained_steps)),
            ("tokens", f"{kv.trained_tokens:,}"),
        ),
        comparison=tuple(ratio_curve(evaluations)),
        sections=(
            Section("layers", "Layer by layer", (ranks(kv),)),
            Section("spectra", "Spectra", tuple(energies(kv))),
            Section("training", "Training", tuple(loss_curve(kv))),
            Section(
                "engines", "What uses it", (table_of("Engines", ["engine", "what it uses of this folder"], engines),)
            ),
        ),
    )


def ranks(kv: KVRecord) -> HeatMap:
    """Return a heat map of kept dimensions by layer and KV head, keys above values; above 8 heads their mean."""
    rows: dict[str, list[float]] = {}
    for what, of_layers in (("keys", kv.key_ranks), ("values", kv.value_ranks)):
        heads = len(of_layers[0]) if of_layers else 0
        if heads > _MOST_HEADS:
            rows[f"{what}, mean of {heads} heads"] = [sum(layer) / len(layer) for layer in of_layers]
        else:
            rows |= {f"{what}, head {n}": [float(layer[n]) for layer in of_layers] for n in range(heads)}
    layers = tuple(str(number) for number in range(len(kv.key_ranks)))
    caption = f"Dimensions kept of {kv.head_dim}, for each layer and KV head"
    return HeatMap(caption, tuple(rows), layers, tuple(map(tuple, rows.values())), "dimensions", form=".0f")


def energies(kv: KVRecord) -> Iterator[Curves]:
    """Yield the cumulative energy of the bases' columns, of keys and of values, as a figure."""
    if kv.key_energy and kv.value_energy:
        both = (("keys", kv.key_energy), ("values", kv.value_energy))
        series = tuple(Series(name, tuple(range(1, len(e) + 1)), tuple(_sums(e))) for name, e in both)
        caption = "Energy that the first columns of a basis hold: mean over layers and KV heads"
        yield Curves(caption, "columns kept", "share of the energy", series)


def loss_curve(kv: KVRecord) -> Iterator[Curves]:
    """Yield the training loss by step with its running mean, as a figure; nothing without training."""
    losses = [value for value in kv.losses if math.isfinite(value)]
    if len(losses) < 2:
        return
    steps = tuple(round((n + 0.5) * kv.trained_steps / len(losses)) for n in range(len(losses)))
    series = [Series("loss", steps, tuple(losses))]
    # Every step draws other ranks, so single values jump about.
    width = len(losses) // 10
    if width > 1:
        parts = [losses[max(0, n - width + 1) : n + 1] for n in range(len(losses))]
        series.append(Series(f"mean of {width}", steps, tuple(math.fsum(part) / len(part) for part in parts)))
    caption = f"Loss over {kv.trained_steps:,} steps on {kv.trained_tokens:,} tokens"
    yield Curves(caption, "step", "loss", tuple(series))


def ratio_curve(evaluations: Sequence[EvaluationRecord]) -> Iterator[Curves]:
    """Yield perplexity by the removed share of the cache, as a figure; needs two evaluations on the same text."""
    if not evaluations:
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


def _summary(report: Report, kv: KVRecord) -> str:
    dims = f"{kv.kept * kv.head_dim:.1f} of {kv.head_dim} dimensions a head on average"
    trained = f"trained for {kv.trained_steps} steps" if kv.trained_steps else "not trained"
    return (
        f"The KV cache of {models_of(report.sources)} keeps {percent(kv.kept)} of its bytes "
        f"(removed {percent(1 - kv.kept)}): {dims}. Method: {report.method.name}, its bases {trained}."
    )


def _sums(values: Sequence[float]) -> list[float]:
    return [math.fsum(values[: n + 1]) for n in range(len(values))]
