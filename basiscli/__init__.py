"""Model surgery: merge, compress and initialise checkpoints and adapters, streamed tensor by tensor.

What the command line does, Python can do, with the same names:

    import basiscli
    result = basiscli.merge(["a", "b", "c"], method="ortho", base="base", output="merged")
    result.report.numbers["lambda"]

Names are loaded when they are first used, so that importing this package costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from basiscli.version import __version__

if TYPE_CHECKING:
    from basiscli.commands.diff.api import TensorDifference, diff
    from basiscli.commands.evaluate.api import Evaluation, ModelFigures, evaluate
    from basiscli.commands.expand.api import ExpandResult, expand
    from basiscli.commands.init.api import InitResult, extract, init, plan_extract, plan_init
    from basiscli.commands.inspect.api import Inspection, inspect
    from basiscli.commands.kv.api import CompressResult, compress, plan_compress
    from basiscli.commands.merge.api import MergeResult, merge, plan_merge
    from basiscli.commands.nola.api import compress_adapter, plan_adapter
    from basiscli.commands.push.api import PushResult, push
    from basiscli.commands.report.api import ReportPage, report
    from basiscli.commands.run.api import RunResult, plan_run, run
    from basiscli.commands.verify.api import Verification, verify
    from basiscli.errors import BasisError, GateFailed, HubError, InputError, ResourceError, UsageError
    from basiscli.reports.schema import Report
    from basiscli.runtime.load import load
    from basiscli.runtime.nola import NolaConfig
    from basiscli.transforms import (
        AttentionMoments,
        Block,
        Blocks,
        Choices,
        DataInit,
        History,
        InputMoments,
        Kind,
        KVCompression,
        Norms,
        Parameters,
        TaskVectorMerge,
        TaskVectors,
        transform,
    )
    from basiscli.transforms.per_model import PerModel, per_model

_HOMES = {
    "basiscli.commands.kv.api": ["CompressResult", "compress", "plan_compress"],
    "basiscli.commands.diff.api": ["TensorDifference", "diff"],
    "basiscli.commands.evaluate.api": ["Evaluation", "ModelFigures", "evaluate"],
    "basiscli.commands.expand.api": ["ExpandResult", "expand"],
    "basiscli.commands.init.api": ["InitResult", "extract", "init", "plan_extract", "plan_init"],
    "basiscli.commands.inspect.api": ["Inspection", "inspect"],
    "basiscli.commands.merge.api": ["MergeResult", "merge", "plan_merge"],
    "basiscli.commands.nola.api": ["compress_adapter", "plan_adapter"],
    "basiscli.commands.push.api": ["PushResult", "push"],
    "basiscli.commands.report.api": ["ReportPage", "report"],
    "basiscli.commands.run.api": ["RunResult", "plan_run", "run"],
    "basiscli.commands.verify.api": ["Verification", "verify"],
    "basiscli.errors": ["BasisError", "GateFailed", "HubError", "InputError", "ResourceError", "UsageError"],
    "basiscli.transforms.per_model": ["PerModel", "per_model"],
    "basiscli.reports.schema": ["Report"],
    "basiscli.runtime.load": ["load"],
    "basiscli.runtime.nola": ["NolaConfig"],
    "basiscli.transforms": [
        "AttentionMoments",
        "Block",
        "Blocks",
        "Choices",
        "DataInit",
        "History",
        "InputMoments",
        "KVCompression",
        "Kind",
        "Norms",
        "Parameters",
        "TaskVectorMerge",
        "TaskVectors",
        "transform",
    ],
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AttentionMoments",
    "BasisError",
    "Block",
    "Blocks",
    "Choices",
    "CompressResult",
    "DataInit",
    "Evaluation",
    "ExpandResult",
    "GateFailed",
    "History",
    "HubError",
    "InitResult",
    "InputError",
    "InputMoments",
    "Inspection",
    "KVCompression",
    "Kind",
    "MergeResult",
    "ModelFigures",
    "NolaConfig",
    "Norms",
    "Parameters",
    "PerModel",
    "PushResult",
    "Report",
    "ReportPage",
    "ResourceError",
    "RunResult",
    "TaskVectorMerge",
    "TaskVectors",
    "TensorDifference",
    "UsageError",
    "Verification",
    "__version__",
    "compress",
    "compress_adapter",
    "diff",
    "evaluate",
    "expand",
    "extract",
    "init",
    "inspect",
    "load",
    "merge",
    "per_model",
    "plan_adapter",
    "plan_compress",
    "plan_extract",
    "plan_init",
    "plan_merge",
    "plan_run",
    "push",
    "report",
    "run",
    "transform",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its module."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'basiscli' has no attribute '{name}'")
    return getattr(import_module(_HOME_OF[name]), name)
