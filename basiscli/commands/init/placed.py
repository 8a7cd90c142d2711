"""The last check of a plan: PEFT itself places every factor, on a model without memory, before one is written."""

from __future__ import annotations

from dataclasses import replace

from basiscli.commands.init.formats import LoRAFormat
from basiscli.commands.init.peft_config import lora_config
from basiscli.commands.init.plan import InitPlan
from basiscli.commands.init.targets import ALL_LINEAR
from basiscli.errors import UsageError
from basiscli.model.names import names_say_everything, parts_of
from basiscli.model.placement import unplaced
from basiscli.names import format_count

_SHOWN = 4  # modules that a note or an error names


def placed(plan: InitPlan) -> InitPlan:
    """Return a plan without the modules that PEFT has no place for, and a note that names them.

    PEFT rewrites what it targets in mixtures of experts: with factors of the experts, dense layers of the same names
    get none. What has no place keeps its whole weight in the residual.

    Raises:
        UsageError: such a module was asked for by name; ranks that would differ between the experts of one stack.
    """
    if not isinstance(plan.format, LoRAFormat):
        return plan
    checkpoint = plan.base or plan.model
    if checkpoint.config.get("architectures") and not names_say_everything(checkpoint) and parts_of(checkpoint) is None:
        note = "transformers does not build this model here: modules have their stored names, and PEFT was not asked"
        return replace(plan, notes=[*plan.notes, note])
    _refuse_ranks_by_expert(plan)
    while True:
        tensors = {module.name: plan.adapter_tensors(name, plan.rank) for name, module in plan.modules.items()}
        lost = unplaced(checkpoint, lora_config(plan, plan.rank, dict.fromkeys(tensors, plan.rank)), tensors)
        if not lost:
            return plan
        named = ", ".join(lost[:_SHOWN]) + (f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else "")
        if plan.target_modules != ALL_LINEAR or len(lost) == len(tensors):
            raise UsageError(
                f"PEFT has no place for the factors of {named}",
                file=checkpoint.source.path,
                remedy="leave them out with --target-modules, or leave out the experts",
            )
        whole = "the difference there is lost" if plan.base is not None else "their weights stay whole"
        note = f"{format_count(len(lost), 'module')} without factors, which PEFT would not place: {named}; {whole}"
        targets = {name: module for name, module in plan.targets.items() if module not in set(lost)}
        plan = replace(plan, targets=targets, notes=[*plan.notes, note])


def _refuse_ranks_by_expert(plan: InitPlan) -> None:
    if plan.energy is None:  # a method that looks at data refuses experts itself
        return
    parts = parts_of(plan.base or plan.model) or {}
    experts = [name for name in plan.targets if name in parts and not parts[name].is_whole]
    if experts:
        raise UsageError(
            "the experts of one stack need one rank, and ranks by energy differ",
            file=plan.model.source.path,
            tensor=experts[0],
            remedy="--rank without --energy, or the other layers with --target-modules",
        )
