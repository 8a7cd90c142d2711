"""The model card of a model with a compressed KV cache."""

from __future__ import annotations

from basiscli.commands.kv.page import contribute
from basiscli.commands.kv.plan import KVPlan
from basiscli.reports.card import card, metadata_of
from basiscli.reports.schema import Report


def kv_card(plan: KVPlan, report: Report) -> bytes:
    """Return the model card (`README.md`): how much of the cache is kept, and how to load the model."""
    metadata = metadata_of(plan.model.source, "quantized", report, library="transformers", tag="kv-cache")
    usage = f'import basiscli\n\nmodel, tokenizer = basiscli.load("{plan.out.name}")'
    return card(metadata, plan.out.name, report, contribute, usage=usage)
