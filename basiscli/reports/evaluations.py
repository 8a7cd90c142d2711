"""What `basis eval --json` printed, read again to be shown in a report."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from basiscli.checkpoints.files import read_json
from basiscli.errors import InputError


class Figures(BaseModel):
    """What one model did on the text."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model: str
    perplexity: float
    accuracy: float
    cache_bytes_per_token: float
    decode_tokens_per_second: dict[int, float] = {}


class EvaluationRecord(BaseModel):
    """A model's figures, and those of the one it was held against."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model: Figures
    against: Figures | None = None
    tokens: int
    text: str
    numbers: dict[str, float]


def read_evaluation(file: Path) -> EvaluationRecord:
    """Read the document that `basis eval --json` printed.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    if not file.is_file():
        raise InputError("no such file", file=file, remedy="write it with `basis eval … --json > FILE`")
    table = read_json(file)
    try:
        return EvaluationRecord.model_validate(table)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(
            f"not an evaluation: {where}: {first['msg']}",
            file=file,
            remedy="write it with `basis eval … --json > FILE`",
        ) from error
