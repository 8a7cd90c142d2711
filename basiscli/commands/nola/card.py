"""The files beside a compressed adapter's weights: the configuration that PEFT reads, and the card."""

from __future__ import annotations

import json

from basiscli.checkpoints.files import ADAPTER_CONFIG
from basiscli.checkpoints.nola import nola_config
from basiscli.commands.nola.page import contribute
from basiscli.commands.nola.plan import NolaPlan
from basiscli.reports.card import card, metadata_of
from basiscli.reports.schema import Report


def nola_files(plan: NolaPlan, report: Report) -> dict[str, bytes]:
    """Return the contents of `adapter_config.json` and `README.md` by file name."""
    lora = plan.adapter.config
    config = nola_config(
        {module.name: [module.in_features, module.out_features] for module in plan.modules},
        base=lora.get("base_model_name_or_path"), task_type=lora.get("task_type"), rank=plan.rank, bases=plan.bases,
        alpha=plan.rank, rslora=False, seed=plan.settings.seed, transposed=bool(lora.get("fan_in_fan_out")),
    )  # fmt: skip
    usage = (
        "import basiscli.runtime.nola  # registers NOLA with PEFT\n"
        f'base = AutoModelForCausalLM.from_pretrained("{lora.get("base_model_name_or_path") or "BASE"}")\n'
        f'model = PeftModel.from_pretrained(base, "{plan.out.name}")'
    )
    metadata = metadata_of(plan.adapter.source, "adapter", report, library="peft", tag="lora")
    return {
        ADAPTER_CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
        "README.md": card(metadata, plan.out.name, report, contribute, usage=usage),
    }
