"""An adapter on its base, with what transformers makes of the base's names at hand."""

from __future__ import annotations

from basiscli.checkpoints.adapter import Adapter
from basiscli.checkpoints.adapter_view import AdapterView
from basiscli.checkpoints.views import Checkpoint
from basiscli.model.names import parts_if_needed


def adapted(adapter: Adapter, base: Checkpoint) -> AdapterView:
    """Return the model that an adapter makes of its base.

    Adapters say what the loaded model calls its modules, files may say something else; which module has its weight
    stored as [in, out] only its class tells.

    Raises:
        InputError: the adapter belongs to another base.
    """
    return AdapterView(adapter, base, lambda: parts_if_needed(base))
