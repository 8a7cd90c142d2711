"""What is said of `--engine` before any work: nothing here needs Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

import basiscli
from basiscli.engine import cluster
from basiscli.errors import UsageError

INSTALLED = object()


def test_without_ray_the_extra_is_named(
    family: dict[str, Path], tmp_path: Path, basis: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    out = tmp_path / "out"
    result = basis("merge", family["a"], family["b"], "-m", "linear", "-o", out, "--engine", "ray")
    assert result.exit_code == 2
    assert "pip install 'basiscli[ray]'" in result.output
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "spark"}, "no engine 'spark'"),
        ({"ray_address": "auto"}, "a Ray address"),
        ({"engine": "ray", "workers": 0}, "0 workers"),
    ],
)
def test_what_makes_no_sense_is_refused(
    family: dict[str, Path], options: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda name: INSTALLED)
    with pytest.raises(UsageError, match=message):
        basiscli.plan_merge([family["a"], family["b"]], method="linear", **options)


@pytest.mark.parametrize("method", ["eva", "corda"])
def test_what_runs_the_model_is_not_shared_out(
    family: dict[str, Path], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda name: INSTALLED)
    with pytest.raises(UsageError, match=f"{method} runs the model layer by layer") as raised:
        basiscli.plan_init(family["a"], method=method, rank=4, engine="ray")
    assert raised.value.remedy == "leave out --engine ray"


def test_a_plan_on_a_cluster_is_the_plan_of_its_workers(
    family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda name: INSTALLED)
    plan = basiscli.plan_merge(
        [family["a"], family["b"]], method="linear", output=tmp_path / "out", engine="ray", workers=7
    )
    assert plan.settings.cluster is not None
    (tmp_path / "out").mkdir()  # a worker finds the place taken
    (tmp_path / "out" / "basis_report.json").write_text("{}")
    there = plan.settings.cluster.plan()
    assert there.fingerprint == plan.fingerprint
    assert there.out == plan.out
