"""What `basiscli.init` and `basiscli.extract` return."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from basiscli.reports.schema import Report


@dataclass(frozen=True)
class InitResult:
    """Where the results are, and the report."""

    path: Path
    """The output folder."""
    adapter: Path
    """The adapter's folder, for `PeftModel.from_pretrained`; with `extract` the output folder itself."""
    residual: Path | None
    """The checkpoint that the adapter belongs to; None where the base stays as it is (`extract`, EVA, NOLA)."""
    report: Report
