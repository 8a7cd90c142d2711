"""An adapter's part of its report: what its factors hold of each layer, and of each direction."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from basiscli.reports.adapters import adapter_settings, energy_grid
from basiscli.reports.blocks import Curves, HeatMap, Section, Series
from basiscli.reports.contribution import Contribution
from basiscli.reports.evaluations import EvaluationRecord
from basiscli.reports.layers import layer_grid, place_of
from basiscli.reports.schema import AdapterRecord, Report
from basiscli.reports.words import joined, label, models_of, percent

_MOST_KINDS = 8  # of modules, in one chart


def contribute(report: Report, evaluations: Sequence[EvaluationRecord] = ()) -> Contribution:
    """Return what a report of `basis init` or `basis extract` says beside what all reports say."""
    adapter = report.adapter
    if adapter is None:
        return Contribution()
    return Contribution(
        summary=_summary(report, adapter),
        tiles=(
            ("parameters to train", f"{report.numbers['adapter_parameters']:,.0f}"),
            ("energy held", percent(report.numbers["energy"])),
        ),
        calibration=adapter.calibration,
        settings=adapter_settings(adapter),
        sections=(
            Section("layers", "Layer by layer", tuple(layer_figures(adapter))),
            Section("spectra", "Spectra", tuple(spectra(adapter))),
        ),
    )


def layer_figures(adapter: AdapterRecord) -> Iterator[HeatMap]:
    """Yield ranks where they differ, the energy that factors hold, and what they take up of the error of NF4."""
    modules = adapter.modules
    ranks = {name: float(module.rank) for name, module in modules.items()}
    nf4 = {
        name: 100 * (1 - module.nf4_error / module.nf4_error_qlora)
        for name, module in modules.items()
        if module.nf4_error and module.nf4_error_qlora
    }
    grids = (
        rank_grid(ranks) if len(set(ranks.values())) > 1 else None,
        energy_grid(adapter),
        layer_grid(nf4, "How much of the error of NF4 the factors take up, in percent", "less error, %", form=".1f"),
    )
    yield from (grid for grid in grids if grid is not None)


def rank_grid(ranks: Mapping[str, float]) -> HeatMap:
    """Return the rank of every module by layer."""
    grid = layer_grid(ranks, "Rank of every module by layer", "rank", form=".0f")
    assert grid is not None  # ranks are finite
    return grid


def spectra(adapter: AdapterRecord) -> Iterator[Curves]:
    """Yield what each direction of the factors holds, falling: one line for each kind of module."""
    relative = all(module.norm is not None for module in adapter.modules.values())
    series = [
        Series(kind, tuple(range(1, len(means) + 1)), means)
        for kind, means in list(_mean_spectra(adapter, relative=relative).items())[:_MOST_KINDS]
    ]
    if not series or max(len(one.x) for one in series) < 2:
        return
    up = "σ / norm of the weight" if relative else "share of the inputs' variance"
    caption = "Singular values of what the factors hold" if relative else "Variance of the inputs along each direction"
    values = [value for one in series for value in one.y]
    steep = 0 < 5 * min(values) < max(values)
    yield Curves(f"{caption}: mean over the layers", "direction", up, tuple(series), log=steep)


def _mean_spectra(adapter: AdapterRecord, *, relative: bool) -> dict[str, tuple[float, ...]]:
    """Return the mean spectrum of each kind of module, each module's by the norm of its weight if that is known."""
    kinds: dict[str, list[list[float]]] = {}
    for name, module in adapter.modules.items():
        whole = (module.norm or 0.0) if relative else 1.0
        if module.spectrum and whole > 0:
            kinds.setdefault(place_of(name)[1], []).append([value / whole for value in module.spectrum])
    return {kind: _mean_of_columns(rows) for kind, rows in kinds.items()}


def _mean_of_columns(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Return the mean at each place, of the rows that are so long."""
    columns = [[row[n] for row in rows if n < len(row)] for n in range(max(map(len, rows)))]
    return tuple(math.fsum(column) / len(column) for column in columns)


def _summary(report: Report, adapter: AdapterRecord) -> str:
    numbers, models = report.numbers, models_of(report.sources)
    least, most = numbers.get("rank_least", adapter.rank), numbers.get("rank_most", adapter.rank)
    ranks = f"of rank {most:.0f}" if least == most else f"of ranks {least:.0f} to {most:.0f}"
    bases = joined([label(source) for source in report.sources if source.role == "base"])
    origin = f"the difference of {models} and {bases}" if report.command == "extract" else models
    return (
        f"An adapter {ranks} for {numbers['modules']:,.0f} modules was made from {origin} by {report.method.name}: "
        f"{numbers['adapter_parameters']:,.0f} parameters to train."
    )
