"""The public Python API, with every keyword; made by tools/make_stubs.py."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from basiscli.commands.diff.api import TensorDifference as TensorDifference
from basiscli.commands.diff.api import diff as diff
from basiscli.commands.evaluate.api import Evaluation as Evaluation
from basiscli.commands.evaluate.api import ModelFigures as ModelFigures
from basiscli.commands.expand.api import ExpandResult as ExpandResult
from basiscli.commands.init.api import InitResult as InitResult
from basiscli.commands.init.plan import InitPlan as InitPlan
from basiscli.commands.inspect.api import Inspection as Inspection
from basiscli.commands.inspect.api import inspect as inspect
from basiscli.commands.kv.api import CompressResult as CompressResult
from basiscli.commands.kv.plan import KVPlan as KVPlan
from basiscli.commands.merge.api import MergeResult as MergeResult
from basiscli.commands.merge.plan import MergePlan as MergePlan
from basiscli.commands.nola.plan import NolaPlan as NolaPlan
from basiscli.commands.push.api import PushResult as PushResult
from basiscli.commands.report.api import ReportPage as ReportPage
from basiscli.commands.report.api import report as report
from basiscli.commands.run.api import RunResult as RunResult
from basiscli.commands.run.pipeline import Pipeline as Pipeline
from basiscli.commands.run.pipeline import StepResult as StepResult
from basiscli.commands.verify.api import Verification as Verification
from basiscli.commands.verify.api import verify as verify
from basiscli.errors import BasisError as BasisError
from basiscli.errors import GateFailed as GateFailed
from basiscli.errors import HubError as HubError
from basiscli.errors import InputError as InputError
from basiscli.errors import ResourceError as ResourceError
from basiscli.errors import UsageError as UsageError
from basiscli.progress import Progress as Progress
from basiscli.reports.schema import Report as Report
from basiscli.runtime.load import load as load
from basiscli.runtime.nola import NolaConfig as NolaConfig
from basiscli.transforms import AttentionMoments as AttentionMoments
from basiscli.transforms import Block as Block
from basiscli.transforms import Blocks as Blocks
from basiscli.transforms import Choices as Choices
from basiscli.transforms import DataInit as DataInit
from basiscli.transforms import History as History
from basiscli.transforms import InputMoments as InputMoments
from basiscli.transforms import Kind as Kind
from basiscli.transforms import KVCompression as KVCompression
from basiscli.transforms import Norms as Norms
from basiscli.transforms import Parameters as Parameters
from basiscli.transforms import TaskVectorMerge as TaskVectorMerge
from basiscli.transforms import TaskVectors as TaskVectors
from basiscli.transforms import transform as transform
from basiscli.transforms.per_model import PerModel as PerModel
from basiscli.transforms.per_model import per_model as per_model
from basiscli.version import __version__ as __version__

def compress(
    model: str | Path = ...,
    *,
    progress: Progress | None = ...,
    kv_ratio: float | None = ...,
    kv_budget: float | None = ...,
    output: str | Path | None = ...,
    calibration: str | Path | None = ...,
    method: str = ...,
    parameters: Mapping[str, Any] = ...,
    fold_values: bool = ...,
    export: Literal["remote-code"] | None = ...,
    train_steps: int = ...,
    batch: int = ...,
    length: int = ...,
    search: Literal["greedy", "spectrum", "uniform"] = ...,
    dtype: str | None = ...,
    plugins: Sequence[str | Path] = ...,
    device: str = ...,
    shard_size: str = ...,
    workers: int | None = ...,
    engine: str = ...,
    ray_address: str | None = ...,
    seed: int = ...,
    resume: bool = ...,
    overwrite: bool = ...,
    headers_only: bool = ...,
) -> CompressResult: ...
def compress_adapter(
    adapter: str | Path,
    *,
    bases: int,
    progress: Progress | None = ...,
    method: Literal["nola"] = ...,
    output: str | Path | None = ...,
    calibration: str | Path | None = ...,
    batch: int = ...,
    length: int = ...,
    rank: int | None = ...,
    bits: int = ...,
    base: str | Path | None = ...,
    weights_only: bool = ...,
    steps: int = ...,
    learning_rate: float = ...,
    min_fidelity: float = ...,
    force: bool = ...,
    device: str = ...,
    seed: int = ...,
    overwrite: bool = ...,
    headers_only: bool = ...,
) -> CompressResult: ...
def evaluate(
    model: str | Path,
    *,
    progress: Progress | None = ...,
    text: str | Path | None = ...,
    against: str | Path | None = ...,
    length: int = ...,
    windows: int = ...,
    prefill: Literal["compressed", "exact"] = ...,
    contexts: Sequence[int] = ...,
    new_tokens: int = ...,
    tasks: Sequence[str] = ...,
    task_path: str | Path | None = ...,
    task_limit: int | None = ...,
    few_shot: int | None = ...,
    device: str = ...,
) -> Evaluation: ...
def expand(
    adapter: str | Path,
    *,
    progress: Progress | None = ...,
    initial: str | Path | None = ...,
    base: str | Path | None = ...,
    output: str | Path | None = ...,
    overwrite: bool = ...,
) -> ExpandResult: ...
def extract(
    model: str | Path,
    *,
    base: str | Path,
    progress: Progress | None = ...,
    energy: float | None = ...,
    output: str | Path | None = ...,
    shard_size: str = ...,
    rank: int | None = ...,
    alpha: float | None = ...,
    rslora: bool = ...,
    exact: bool = ...,
    target_modules: str | Sequence[str] = ...,
    dtype: str | None = ...,
    allow_nonfinite: bool = ...,
    device: str = ...,
    workers: int | None = ...,
    engine: str = ...,
    ray_address: str | None = ...,
    memory: str = ...,
    seed: int = ...,
    resume: bool = ...,
    overwrite: bool = ...,
    headers_only: bool = ...,
) -> InitResult: ...
def init(
    model: str | Path,
    *,
    progress: Progress | None = ...,
    method: str = ...,
    output: str | Path | None = ...,
    calibration: str | Path | None = ...,
    tokens: int | None = ...,
    length: int | None = ...,
    quantize: str | None = ...,
    rho: float | None = ...,
    whiten: bool = ...,
    center: bool | None = ...,
    bases: int | None = ...,
    parameters: Mapping[str, Any] = ...,
    rank: int | None = ...,
    alpha: float | None = ...,
    rslora: bool = ...,
    exact: bool = ...,
    target_modules: str | Sequence[str] = ...,
    dtype: str | None = ...,
    allow_nonfinite: bool = ...,
    plugins: Sequence[str | Path] = ...,
    device: str = ...,
    shard_size: str = ...,
    workers: int | None = ...,
    engine: str = ...,
    ray_address: str | None = ...,
    memory: str = ...,
    seed: int = ...,
    resume: bool = ...,
    overwrite: bool = ...,
    headers_only: bool = ...,
) -> InitResult: ...
def merge(
    models: Sequence[str | Path],
    *,
    progress: Progress | None = ...,
    method: str,
    output: str | Path | None = ...,
    base: str | Path | None = ...,
    onto: str | Path | None = ...,
    parameters: Mapping[str, Any] = ...,
    weights: Sequence[float] | None = ...,
    as_adapter: bool = ...,
    dtype: str | None = ...,
    allow_nonfinite: bool = ...,
    allow_missing: bool = ...,
    trust_remote_code: bool = ...,
    plugins: Sequence[str | Path] = ...,
    device: str = ...,
    shard_size: str = ...,
    workers: int | None = ...,
    engine: str = ...,
    ray_address: str | None = ...,
    memory: str = ...,
    seed: int = ...,
    resume: bool = ...,
    overwrite: bool = ...,
    headers_only: bool = ...,
) -> MergeResult: ...
def plan_adapter(
    adapter: str | Path,
    *,
    bases: int,
    method: Literal["nola"] = ...,
    output: str | Path | None = ...,
    calibration: str | Path | None = ...,
    batch: int = ...,
    length: int = ...,
    rank: int | None = ...,
    bits: int = ...,
    base: str | Path | None = ...,
    weights_only: bool = ...,
    steps: int = ...,
    learning_rate: float = ...,
    min_fidelity: float = ...,
    force: bool = ...,
    device: str = ...,
    seed: int = ...,
    overwrite: bool = ...,
    headers_only: bool = ...,
) -> NolaPlan: ...
def plan_compress(
    model: str | Path = ...,
    *,
    kv_ratio: float | None = ...,
    kv_budget: float | None = ...,
    output: str | Path | None = ...,
    calibration: str | Path | None = ...,
    method: str = ...,
    parameters: Mapping[str, Any] = ...,
    fold_values: bool = ...,
    export: Literal["remote-code"] | None = ...,
    train_steps: int = ...,
    batch: int = ...,
    length: int = ...,
    search: Literal["greedy", "spectrum", "uniform"] = ...,
    dtype: str | None = ...,
    plugins: Sequence[str | Path] = ...,
    device: str = ...,
    shard_size: str = ...,
    workers: int | None = ...,
    engine: str = ...,
    ray_address: str | None = ...,
    seed: int = ...,
    resume: bool = ...,
    overwrite: bool = ...,
    headers_only: bool = ...,
) -> KVPlan: ...
def plan_extract(
    model: str | Path,
    *,
    base: str | Path,
    energy: float | None = ...,
    output: str | Path | None = ...,
    shard_size: str = ...,
    rank: int | None = ...,
    alpha: float | None = ...,
    rslora: bool = ...,
    exact: bool = ...,
    target_modules: str | Sequence[str] = ...,
    dtype: str | None = ...,
    allow_nonfinite: bool = ...,
    device: str = ...,
    workers: int | None = ...,
    engine: str = ...,
    ray_address: str | None = ...,
    memory: str = ...,
    seed: int = ...,
    resume: bool = ...,
    overwrite: bool = ...,
    headers_only: bool = ...,
) -> InitPlan: ...
def plan_init(
    model: str | Path,
    *,
    method: str = ...,
    output: str | Path | None = ...,
    calibration: str | Path | None = ...,
    tokens: int | None = ...,
    length: int | None = ...,
    quantize: str | None = ...,
    rho: float | None = ...,
    whiten: bool = ...,
    center: bool | None = ...,
    bases: int | None = ...,
    parameters: Mapping[str, Any] = ...,
    rank: int | None = ...,
    alpha: float | None = ...,
    rslora: bool = ...,
    exact: bool = ...,
    target_modules: str | Sequence[str] = ...,
    dtype: str | None = ...,
    allow_nonfinite: bool = ...,
    plugins: Sequence[str | Path] = ...,
    device: str = ...,
    shard_size: str = ...,
    workers: int | None = ...,
    engine: str = ...,
    ray_address: str | None = ...,
    memory: str = ...,
    seed: int = ...,
    resume: bool = ...,
    overwrite: bool = ...,
    headers_only: bool = ...,
) -> InitPlan: ...
def plan_merge(
    models: Sequence[str | Path],
    *,
    method: str,
    output: str | Path | None = ...,
    base: str | Path | None = ...,
    onto: str | Path | None = ...,
    parameters: Mapping[str, Any] = ...,
    weights: Sequence[float] | None = ...,
    as_adapter: bool = ...,
    dtype: str | None = ...,
    allow_nonfinite: bool = ...,
    allow_missing: bool = ...,
    trust_remote_code: bool = ...,
    plugins: Sequence[str | Path] = ...,
    device: str = ...,
    shard_size: str = ...,
    workers: int | None = ...,
    engine: str = ...,
    ray_address: str | None = ...,
    memory: str = ...,
    seed: int = ...,
    resume: bool = ...,
    overwrite: bool = ...,
    headers_only: bool = ...,
) -> MergePlan: ...
def plan_run(
    recipe: str | Path,
    *,
    output: str | Path | None = ...,
    dtype: str | None = ...,
    allow_nonfinite: bool = ...,
    allow_missing: bool = ...,
    trust_remote_code: bool = ...,
    plugins: Sequence[str | Path] = ...,
    device: str = ...,
    shard_size: str = ...,
    workers: int | None = ...,
    engine: str = ...,
    ray_address: str | None = ...,
    memory: str = ...,
    seed: int = ...,
    resume: bool = ...,
    overwrite: bool = ...,
    headers_only: bool = ...,
) -> MergePlan | Pipeline: ...
def push(
    folder: str | Path,
    target: str,
    *,
    progress: Progress | None = ...,
    private: bool = ...,
    create_pr: bool = ...,
    revision: str | None = ...,
    message: str | None = ...,
) -> PushResult: ...
def run(
    recipe: str | Path,
    *,
    progress: Progress | None = ...,
    finished: Callable[[StepResult], None] | None = ...,
    output: str | Path | None = ...,
    dtype: str | None = ...,
    allow_nonfinite: bool = ...,
    allow_missing: bool = ...,
    trust_remote_code: bool = ...,
    plugins: Sequence[str | Path] = ...,
    device: str = ...,
    shard_size: str = ...,
    workers: int | None = ...,
    engine: str = ...,
    ray_address: str | None = ...,
    memory: str = ...,
    seed: int = ...,
    resume: bool = ...,
    overwrite: bool = ...,
    headers_only: bool = ...,
) -> RunResult: ...
