"""What `basis eval --json` printed, read again to be shown in a report."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from basiscli.checkpoints.files import read_json
from basiscli.errors import InputError


class Figures(BaseModel):
    """What one model scored on a text."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model: str
    """Folder or Hub id."""
    perplexity: float
    accuracy: float
    """Share of tokens that it ranks first."""
    cache_bytes_per_token: float
    decode_tokens_per_second: dict[int, float] = {}
    """By the tokens that are in the cache already."""


class EvaluationRecord(BaseModel):
    """What `basis eval` measured of a model, and of the one that it was compared with."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model: Figures
    against: Figures | None = None
    tokens: int
    """That were scored."""
    text: str
    """The name of the text."""
    numbers: dict[str, float]
    """By the names that `basiscli.reports.numbers` explains."""


def read_evaluation(file: Path) -> EvaluationRecord:
    """Return what `basis eval --json` printed into a file.

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
