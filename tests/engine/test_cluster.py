"""What is said of `--engine` before any work: nothing here needs Ray."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

import basiscli
from basiscli.commands.init.api import plan_init
from basiscli.commands.kv.api import plan_compress
from basiscli.engine import cluster
from basiscli.errors import UsageError
from tests.kv_models import make_model, save_model

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


PLANS: dict[str, Callable[..., Any]] = {
    "merge": lambda model, **options: basiscli.plan_merge([model, model], method="linear", **options),
    "pissa": lambda model, **options: plan_init(model, rank=4, **options),
    "eva": lambda model, **options: plan_init(model, method="eva", rank=4, tokens=64, **options),
    "compress": lambda model, **options: plan_compress(model, kv_ratio=0.5, train_steps=3, **options),
}


@pytest.mark.parametrize("command", PLANS)
def test_a_plan_on_a_cluster_is_the_plan_of_its_workers(
    tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda name: INSTALLED)
    model = save_model(tmp_path / "model", make_model())
    plan = PLANS[command](model, output=tmp_path / "out", engine="ray", workers=7)
    assert plan.settings.cluster is not None
    assert plan.settings.cluster.workers == 7
    (tmp_path / "out").mkdir()  # a worker finds the place taken
    (tmp_path / "out" / "basis_report.json").write_text("{}")
    there = pickle.loads(pickle.dumps(plan.settings.cluster.plan))()
    assert there.settings.cluster is None
    assert there.fingerprint == plan.fingerprint
    assert there.out == plan.out


def test_nola_is_made_where_the_command_is_given(tmp_path: Path, basis: Callable[..., Result]) -> None:
    result = basis("compress", tmp_path, "--method", "nola", "--engine", "ray")
    assert result.exit_code == 2
    assert "--engine ray" in result.output
