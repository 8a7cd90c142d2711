"""What reports of adapters have in common, whichever command made the adapter."""

from __future__ import annotations

from basiscli.reports.blocks import HeatMap
from basiscli.reports.layers import layer_grid
from basiscli.reports.schema import AdapterRecord
from basiscli.reports.words import yes_no


def adapter_settings(adapter: AdapterRecord) -> tuple[tuple[str, str], ...]:
    """Return rank, alpha and form of an adapter as (name, value)."""
    found = [
        ("rank", str(adapter.rank)),
        ("alpha", f"{adapter.alpha:g}"),
        ("rsLoRA", yes_no(adapter.rslora)),
        ("trained", adapter.trains),
    ]
    return (*found, ("quantised base", adapter.quantize)) if adapter.quantize else tuple(found)


def energy_grid(adapter: AdapterRecord) -> HeatMap | None:
    """Return the share that each module's factors hold, in percent; None where none holds any yet."""
    energy = {name: 100 * module.energy for name, module in adapter.modules.items() if module.rank}
    if not any(energy.values()):
        return None
    of_weights = any(module.norm is not None for module in adapter.modules.values())
    of = "the weight's squared norm" if of_weights else "its inputs' variance"
    return layer_grid(energy, f"Share of {of} that a module's factors hold, in percent", "energy, %", form=".1f")
