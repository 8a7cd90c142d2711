"""Merge two fine-tunes from Python, look at the report, and compare the result with its inputs.

    python examples/merge_and_compare.py

Uses the real models that `make demo` installs; put your own folders, Hub ids or adapters in their place.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import basiscli
from basiscli.commands.demo.api import model_folder


def main() -> None:
    """Merge, then print what the report and `diff` say."""
    base, sre, jobs = (model_folder(name) for name in ("base", "sre", "jobs"))
    with tempfile.TemporaryDirectory() as folder:
        first = basiscli.merge([sre], method="ortho", base=base, output=Path(folder) / "first")
        # Models that arrive later join without the earlier ones: the report remembers what is needed.
        merged = basiscli.merge([jobs], onto=first.path, method="ortho", base=base, output=Path(folder) / "both")
        at_once = basiscli.merge([sre, jobs], method="ortho", base=base, output=Path(folder) / "at-once")

        report = merged.report
        assert report.task_vectors is not None
        print(f"λ = {report.numbers['lambda']:.4f}, task vector norms {report.task_vectors.norms}")
        closest = max(report.tensors, key=lambda t: t.merged_norm or 0.0)
        print(f"changed most: {closest.name}, r = {closest.r}")

        apart = basiscli.diff(merged.path, at_once.path)
        print(f"one after another against both at once: relative difference {apart.relative:.1e}")
        assert apart.relative < 1e-6
        print(f"weights verified: {basiscli.verify(merged.path).weights_digest}")


if __name__ == "__main__":
    main()
