"""Which kind of run carries out a plan."""

from __future__ import annotations

from basiscli.commands.init.by_energy import EnergyRun
from basiscli.commands.init.coefficients import CoefficientsRun
from basiscli.commands.init.from_data import DataRun
from basiscli.commands.init.from_weights import WeightsAndInputsRun, WeightsRun
from basiscli.commands.init.plan import InitPlan
from basiscli.commands.init.run import InitRun


def run_type(plan: InitPlan) -> type[InitRun]:
    """Return the class whose instance, made of the plan and its output, does the work."""
    if plan.method.shares_ranks:
        return DataRun
    if plan.energy is not None:
        return EnergyRun
    if plan.trains_coefficients:
        return CoefficientsRun
    return WeightsAndInputsRun if plan.calibration is not None else WeightsRun
