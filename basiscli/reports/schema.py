"""The report that every run writes beside its weights: `basis_report.json`.

Fields are added within a schema version, never renamed or removed. Everything outside `cost`, `versions` and `created`
is the same for the same inputs, parameters and version.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from basiscli.checkpoints.files import REPORT, read_json
from basiscli.errors import InputError

SCHEMA_VERSION = 1


class _Record(BaseModel):
    # NaN and Inf, which JSON has no numbers for, are written as strings and read back.
    model_config = ConfigDict(extra="ignore", frozen=True, ser_json_inf_nan="strings", use_attribute_docstrings=True)


class SourceRecord(_Record):
    """One input."""

    role: Literal["base", "model", "onto"]
    spec: str
    """As it was given."""
    kind: Literal["checkpoint", "adapter"]
    repo_id: str | None = None
    revision: str | None = None
    """Commit on the Hub."""
    license: str | None = None
    weight: float | None = None
    digest: str | None = None
    """`weights_digest` of the tensors that were read; see `Report.weights_digest`."""


class MethodRecord(_Record):
    """What was done."""

    name: str
    parameters: dict[str, object]
    source: str = ""


class TensorRecord(_Record):
    """One tensor of the output. Norms are Frobenius norms of task vectors, in the order of the models."""

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str
    action: Literal["merged", "copied", "rotated", "factor", "residual"]
    """rotated: the bases of the values were folded in; factor: of an adapter; residual: what the adapter leaves."""
    norms: list[float] | None = None
    cosines: list[list[float | None]] | None = None
    merged_norm: float | None = None
    base_norm: float | None = None
    """Of the base's tensor, as far as the run had it at hand: what the others are large or small against."""
    r: list[int] | None = None
    """ortho: leading singular directions of the merged model that were closed to each model after the first."""


class TaskVectorRecord(_Record):
    """Task vectors of whole models, every parameter counted once."""

    norms: list[float]
    cosines: list[list[float | None]]
    merged_norm: float


class CalibrationRecord(_Record):
    """The text that bases and ranks were found with."""

    name: str
    tokens: int
    sha256: str
    """Of the token ids."""


class KVRecord(_Record):
    """A compressed KV cache."""

    key_ranks: list[list[int]]
    """Dimensions kept, one number a KV head, one list a layer."""
    value_ranks: list[list[int]]
    head_dim: int
    kept: float
    """Share of the cache's bytes."""
    bytes_per_token: int
    """Of the small cache in the weights' dtype, all layers."""
    dense_bytes_per_token: int
    key_energy: list[float] | None = None
    """Share of the keys' energy that each column of a basis holds, in order; the mean over layers and KV heads."""
    value_energy: list[float] | None = None
    values_folded: bool
    search: str
    trained_steps: int
    trained_tokens: int
    losses: list[float]
    """Mean loss of each hundredth of the training."""
    calibration: CalibrationRecord | None = None
    bases_sha256: str | None = None
    """Of `kv_projection.safetensors`."""
    engines: dict[str, str]
    """Which engine can use what of this folder."""


class ModuleRecord(_Record):
    """One weight that an adapter has factors of."""

    rank: int
    norm: float | None = None
    """Frobenius norm of what was decomposed: the weight, or the difference of two; None where the data was."""
    energy: float
    """Share of its squared norm that the factors hold, as stored; of the inputs' variance where A is from data."""
    error: float | None = None
    """Of residual + s·B·A against the weight, relative."""
    spectrum: list[float] | None = None
    """The first 32 singular values of s·B·A as it starts; where A is from data, shares of the inputs' variance."""
    nf4_error: float | None = None
    """With `--quantize`: Frobenius norm of nf4(residual) + s·B·A − W."""
    nf4_error_qlora: float | None = None
    """Of nf4(W) − W, what it is without factors."""


class AdapterRecord(_Record):
    """An adapter that was made from weights or from data."""

    rank: int
    """Of every module; the mean where modules differ, the most where `--energy` decided."""
    alpha: float
    rslora: bool
    exact: bool
    trains: Literal["factors", "values", "coefficients"] = "factors"
    """values: B diag(σ) A with only σ trained, without scaling; PEFT's TinyLoRA. coefficients: of NOLA's bases."""
    quantize: Literal["nf4"] | None = None
    """The format to load the residual in."""
    modules: dict[str, ModuleRecord]
    """By name; where values are trained, in the order of the model's modules, by which PEFT numbers them."""
    calibration: CalibrationRecord | None = None


class Continuation(_Record):
    """What `--onto` needs to continue this merge."""

    method: str
    parameters: dict[str, object]
    weights: list[float]
    numbers: dict[str, float]


class Cost(_Record):
    """What the run took."""

    seconds: float
    seconds_merging: float | None = None
    seconds_of: dict[str, float] | None = None
    """Of each part of the work (compress)."""
    peak_memory_bytes: int
    """Of the whole process."""
    read_bytes: int
    written_bytes: int
    workers: int
    device: str
    resumed_steps: int
    """Pieces of work that an interrupted run had finished."""


class Report(_Record):
    """The whole report."""

    schema_version: int = SCHEMA_VERSION
    command: Literal["merge", "compress", "init", "extract"]
    created: str
    method: MethodRecord
    sources: list[SourceRecord]
    reproduce: str | None = None
    """The command that makes it again, in a folder that holds the inputs."""
    seed: int
    notes: list[str]
    numbers: dict[str, float]
    """Named numbers of the whole run."""
    task_vectors: TaskVectorRecord | None = None
    continuation: Continuation | None = None
    kv: KVRecord | None = None
    adapter: AdapterRecord | None = None
    kinds_found_by: Literal["names", "model"]
    weights_digest: str
    """SHA-256 of the lines `name dtype shape sha256` of all tensors in order of their names: the same however a
    checkpoint is cut into shards."""
    tensors: list[TensorRecord]
    cost: Cost
    versions: dict[str, str]

    def as_file(self) -> bytes:
        """Return the report as `basis_report.json` holds it."""
        return (self.model_dump_json(indent=1) + "\n").encode()


def read_report(folder: Path) -> Report | None:
    """Return the report that lies in a folder, and None where there is none.

    Raises:
        InputError: if it is of a newer schema or is damaged.
    """
    table = read_json(folder / REPORT)
    if not table:
        return None
    version = table.get("schema_version")
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise InputError(
            f"the report has schema version {version}; this basis reads up to {SCHEMA_VERSION}",
            file=folder / REPORT,
            remedy="update basis",
        )
    try:
        return Report.model_validate(table)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(
            f"the report is damaged: {where}: {first['msg']}", file=folder / REPORT, remedy="make the model again"
        ) from error
