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
    from basiscli.api.compress import CompressResult, compress, plan_compress
    from basiscli.api.diff import TensorDifference, diff
    from basiscli.api.evaluate import Evaluation, ModelFigures, evaluate
    from basiscli.api.expand import ExpandResult, expand
    from basiscli.api.init import InitResult, extract, init, plan_extract, plan_init
    from basiscli.api.inspect import Inspection, inspect
    from basiscli.api.merge import MergeResult, merge, plan_merge
    from basiscli.api.nola import compress_adapter, plan_adapter
    from basiscli.api.push import PushResult, push
    from basiscli.api.report import ReportPage, report
    from basiscli.api.run import RunResult, plan_run, run
    from basiscli.api.verify import Verification, verify
    from basiscli.checkpoints.architecture import Kind
    from basiscli.errors import BasisError, GateFailed, HubError, InputError, ResourceError, UsageError
    from basiscli.model_parameters import PerModel, per_model
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
        KVCompression,
        Norms,
        Parameters,
        TaskVectorMerge,
        TaskVectors,
        transform,
    )

_HOMES = {
    "basiscli.api.compress": ["CompressResult", "compress", "plan_compress"],
    "basiscli.api.diff": ["TensorDifference", "diff"],
    "basiscli.api.evaluate": ["Evaluation", "ModelFigures", "evaluate"],
    "basiscli.api.expand": ["ExpandResult", "expand"],
    "basiscli.api.init": ["InitResult", "extract", "init", "plan_extract", "plan_init"],
    "basiscli.api.inspect": ["Inspection", "inspect"],
    "basiscli.api.merge": ["MergeResult", "merge", "plan_merge"],
    "basiscli.api.nola": ["compress_adapter", "plan_adapter"],
    "basiscli.api.push": ["PushResult", "push"],
    "basiscli.api.report": ["ReportPage", "report"],
    "basiscli.api.run": ["RunResult", "plan_run", "run"],
    "basiscli.api.verify": ["Verification", "verify"],
    "basiscli.checkpoints.architecture": ["Kind"],
    "basiscli.errors": ["BasisError", "GateFailed", "HubError", "InputError", "ResourceError", "UsageError"],
    "basiscli.model_parameters": ["PerModel", "per_model"],
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
