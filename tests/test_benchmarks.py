"""Benchmarks that need a machine we may not have: that they run at all, on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def test_the_gpu_benchmark_measures_everything_that_it_names(tmp_path: Path) -> None:
    results = tmp_path / "gpu.json"
    words = ["--shape", "tiny", "--device", "cpu", "--work", tmp_path, "-o", results]
    run = subprocess.run([sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(results.read_text())
    assert {row["what"].split(",")[0] for row in found["commands"]} == {
        "merge linear", "merge ties", "merge ortho", "init pissa", "init pissa --exact", "init eva",
    }  # fmt: skip
    assert all(row["seconds"] > 0 and row["of_copies"] > 0 for row in found["commands"])
    assert all(seconds > 0 for row in found["eigenvectors"] for seconds in row["seconds_each"].values())
    assert [row["batch"] for row in found["decoding"]] == [1, 8, 32]
    assert found["machine"]["device"] and "products, float64, TFLOP/s" in found["peaks"]
    assert [file.name for file in tmp_path.iterdir()] == ["gpu.json"], "models were left behind"
