"""A compressed adapter's part of its report: fidelity, and the explained share of each module."""

from __future__ import annotations

from collections.abc import Sequence

from basiscli.reports.adapters import adapter_settings, energy_grid
from basiscli.reports.blocks import Section
from basiscli.reports.contribution import Contribution
from basiscli.reports.evaluations import EvaluationRecord
from basiscli.reports.schema import Report
from basiscli.reports.words import models_of, percent


def contribute(report: Report, evaluations: Sequence[EvaluationRecord] = ()) -> Contribution:
    """Return the parts of a report that only `basis compress ADAPTER --method nola` has; empty for other reports."""
    adapter, numbers = report.adapter, report.numbers
    if adapter is None:
        return Contribution()
    coefficients, survives = f"{numbers['adapter_parameters']:,.0f}", percent(numbers["fidelity"])
    grid = energy_grid(adapter)
    return Contribution(
        summary=f"The adapter {models_of(report.sources)} became {coefficients} coefficients in "
        f"{numbers['modules']:,.0f} modules by {report.method.name}: {survives} of its effect survives.",
        tiles=(("parameters to train", coefficients), ("effect that survives", survives)),
        calibration=adapter.calibration,
        settings=adapter_settings(adapter),
        sections=(Section("layers", "Layer by layer", () if grid is None else (grid,)),),
    )
