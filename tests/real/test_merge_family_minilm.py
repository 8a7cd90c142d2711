"""The merge family on two published fine-tunes of MiniLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import basiscli
from tests.conftest import read_checkpoint

pytestmark = pytest.mark.real


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("ties", {"density": 0.3}), ("dare_linear", {"density": 0.5}), ("sce", {"select_topk": 0.5}), ("karcher", {})],
)
def test_merged_fine_tunes_are_between_base_and_sum(
    minilm: dict[str, Path], tmp_path: Path, method: str, parameters: dict[str, Any]
) -> None:
    models = [minilm["sre"], minilm["jobs"]]
    result = basiscli.merge(models, method=method, base=minilm["base"], parameters=parameters, output=tmp_path / "out")
    vectors = result.report.task_vectors
    assert vectors is not None
    assert 0 < vectors.merged_norm < 2 * sum(vectors.norms)
    base, merged = read_checkpoint(minilm["base"]), read_checkpoint(result.path)
    assert merged.keys() == base.keys()
    assert all(bool(torch.isfinite(tensor).all()) for tensor in merged.values())


def test_ties_keeps_the_share_it_says(minilm: dict[str, Path], tmp_path: Path) -> None:
    """One model: nothing to elect, so that what is left of its task vector is what was trimmed."""
    result = basiscli.merge(
        [minilm["sre"]], method="ties", base=minilm["base"], parameters={"density": 0.2}, output=tmp_path / "out"
    )
    base, model, merged = (read_checkpoint(folder) for folder in (minilm["base"], minilm["sre"], result.path))
    for name in ("embeddings.word_embeddings.weight", "encoder.layer.3.attention.self.query.weight"):
        delta, kept = model[name] - base[name], merged[name] != base[name]
        wanted = int(0.2 * delta.numel())
        threshold = delta.abs().flatten().kthvalue(delta.numel() - wanted + 1).values
        assert int(kept.sum()) <= wanted
        # An element that stays is never smaller than one that goes.
        assert float(delta[kept].abs().min()) >= float(threshold)
        torch.testing.assert_close(merged[name][kept], model[name][kept], rtol=1e-6, atol=1e-7)
