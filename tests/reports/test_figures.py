"""The numbers behind the pictures, held against dense computations in float64."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file

import basiscli
from basiscli.commands.init.page import rank_grid
from basiscli.commands.kv import page as kv_page
from basiscli.reports.blocks import Curves, HeatMap, as_table
from basiscli.reports.evaluations import read_evaluation
from basiscli.reports.layers import layer_grid
from basiscli.reports.plots import svg
from tests.conftest import read_checkpoint
from tests.init_models import factors
from tests.reports.conftest import RATIOS, Outputs

FLOAT32 = 1e-6


def test_norms_of_the_base_and_the_change_are_those_of_the_files(outputs: Outputs) -> None:
    before = {n: t.double() for n, t in read_checkpoint(outputs["merge"].parent / "base").items()}
    after = {n: t.double() for n, t in read_checkpoint(outputs["merge"]).items()}
    report = basiscli.report(outputs["merge"]).report
    told = [tensor for tensor in report.tensors if tensor.base_norm is not None]
    assert len(told) > 6
    for tensor in told:
        assert tensor.base_norm == pytest.approx(float(before[tensor.name].norm()), rel=FLOAT32)
        change = float((after[tensor.name] - before[tensor.name]).norm())
        assert tensor.merged_norm == pytest.approx(change, rel=1e-4, abs=1e-7)


def test_function_merges_tell_the_norm_of_the_base_too(outputs: Outputs, tmp_path: Path) -> None:
    place = outputs["merge"].parent
    made = basiscli.merge(
        [place / "a", place / "b"], method="task_arithmetic", base=place / "base", output=tmp_path / "out"
    )
    base = read_checkpoint(place / "base")
    for tensor in made.report.tensors:
        assert tensor.base_norm == pytest.approx(float(base[tensor.name].double().norm()), rel=FLOAT32)


@pytest.mark.parametrize("kind", ["init", "nf4"])
def test_spectra_are_the_singular_values_of_the_factors(outputs: Outputs, kind: str) -> None:
    adapter = basiscli.report(outputs[kind]).report.adapter
    assert adapter is not None
    for module, (b, a) in factors(outputs[kind] / "adapter").items():
        sigma = numpy.linalg.svd((b.double() @ a.double()).numpy(), compute_uv=False)[: adapter.rank]
        sigma *= adapter.alpha / adapter.rank
        assert adapter.modules[module].spectrum == pytest.approx(sigma.tolist(), rel=1e-5)


def test_spectra_from_data_are_shares_of_variance(outputs: Outputs) -> None:
    adapter = basiscli.report(outputs["data"]).report.adapter
    assert adapter is not None
    for module in adapter.modules.values():
        shares = module.spectrum or []
        assert len(shares) == module.rank
        assert shares == sorted(shares, reverse=True)
        assert math.fsum(shares) == pytest.approx(module.energy, rel=1e-4)


def test_spectra_of_an_extraction_hold_the_energy(outputs: Outputs) -> None:
    adapter = basiscli.report(outputs["extract"]).report.adapter
    assert adapter is not None
    for module in adapter.modules.values():
        if module.rank and module.norm and module.rank <= 32:
            assert math.fsum(s * s for s in module.spectrum or []) == pytest.approx(
                module.energy * module.norm**2, rel=1e-4
            )


def test_energies_of_kv_columns_are_those_of_the_bases(outputs: Outputs) -> None:
    kv = basiscli.report(outputs["compress"]).report.kv
    assert kv is not None
    stored = load_file(outputs["compress"] / "kv_projection.safetensors")
    for what, told in (("keys", kv.key_energy), ("values", kv.value_energy)):
        energy = torch.stack([stored[f"layers.{n}.{what}.energy"] for n in range(len(kv.key_ranks))]).double()
        assert told == pytest.approx((energy / energy.sum(-1, keepdim=True)).mean((0, 1)).tolist(), rel=1e-4)
        assert math.fsum(told or []) == pytest.approx(1, abs=1e-4)
    (curves,) = kv_page.energies(kv)
    assert all(one.y[-1] == pytest.approx(1, abs=1e-4) for one in curves.series)


def test_ranks_of_the_cache_are_in_their_places(outputs: Outputs) -> None:
    report = basiscli.report(outputs["compress"]).report
    assert report.kv is not None
    grid = kv_page.ranks(report.kv)
    values = torch.tensor(grid.values)
    told = torch.tensor([report.kv.key_ranks, report.kv.value_ranks])  # [2, layers, heads]
    assert torch.equal(values, told.transpose(1, 2).flatten(0, 1).float())


def test_perplexity_by_ratio_comes_from_the_evaluations(outputs: Outputs) -> None:
    seen = [read_evaluation(file) for file in outputs.evaluations]
    (curves,) = kv_page.ratio_curve(seen)
    told = dict(zip(curves.series[0].x, curves.series[0].y, strict=True))
    assert list(told) == pytest.approx([0, *(100 * ratio for ratio in RATIOS)])
    assert seen[0].against is not None
    assert list(told.values()) == [seen[0].against.perplexity, *(one.model.perplexity for one in seen)]
    assert not list(kv_page.ratio_curve(seen[:1]))  # one point and the dense model are no curve
    other = seen[1].model_copy(update={"text": "another"})
    assert not list(kv_page.ratio_curve([seen[0], other]))


@pytest.mark.parametrize(
    "wrong", ["{}", "[1]", "not json", json.dumps({"model": {"model": "m"}, "numbers": {}}), "\x00"]
)
def test_what_is_no_evaluation_is_refused(outputs: Outputs, tmp_path: Path, wrong: str) -> None:
    (tmp_path / "eval.json").write_text(wrong)
    with pytest.raises(basiscli.InputError):
        basiscli.report(outputs["compress"], evaluations=[tmp_path / "eval.json"])
    with pytest.raises(basiscli.InputError, match="no such file"):
        basiscli.report(outputs["compress"], evaluations=[tmp_path / "absent.json"])


# Grids ----------------------------------------------------------------------------------------------------------------


def test_a_grid_puts_modules_at_their_layer_and_kind() -> None:
    names = {
        "model.layers.2.mlp.up_proj.weight": 1.0,
        "model.layers.10.mlp.up_proj.weight": 2.0,
        "model.layers.10.mlp.experts.0.w1.weight": 3.0,
        "model.layers.10.mlp.experts.7.w1.weight": 5.0,
        "model.layers.2.self_attn.q_proj.weight": float("nan"),
        "lm_head.weight": 7.0,
    }
    grid = layer_grid(names, "caption", "number")
    assert grid is not None
    assert grid.columns == ("2", "10", "outside")
    told = dict(zip(grid.rows, grid.values, strict=True))
    assert told == {
        "mlp.up_proj": (1.0, 2.0, None),
        "mlp.experts.*.w1": (None, 4.0, None),
        "lm_head": (None, None, 7.0),
    }
    assert layer_grid({"a": float("inf")}, "caption", "number") is None


def test_encoder_and_decoder_have_rows_of_their_own() -> None:
    names = {
        f"{part}.block.{n}.layer.0.SelfAttention.q.weight": float(n) for part in ("encoder", "decoder") for n in (0, 1)
    }
    grid = layer_grid(names, "caption", "number")
    assert grid is not None
    assert set(grid.rows) == {"encoder: layer.0.SelfAttention.q", "decoder: layer.0.SelfAttention.q"}
    assert set(grid.values) == {(0.0, 1.0)}


def test_the_picture_of_ranks_is_the_same_again_and_names_every_kind() -> None:
    ranks = {f"model.layers.{n}.{m}": 3.0 + n for n in range(12) for m in ("mlp.up_proj", "self_attn.q_proj")}
    grid = rank_grid(ranks | {"pooler.dense": 1.0})
    picture = svg(grid, "ranks", alone=True)
    assert picture == svg(grid, "ranks", alone=True)
    for label in ("mlp.up_proj", "self_attn.q_proj", "pooler.dense", "outside", ">14<", "prefers-color-scheme:dark"):
        assert label in picture
    assert picture.count("<title>") == len(ranks) + 1
    assert "http" not in re.sub(r' xmlns(:xlink)?="[^"]*"', "", picture)


def test_tables_of_figures_hold_their_ends() -> None:
    grid = HeatMap("c", ("row",), ("0", "1", "2"), ((3.0, None, 1.0),), "number", form=".0f")
    assert as_table(grid).rows == (("row", "2", "1 (2)", "2", "3 (0)"),)
    curve = Curves("c", "x", "y", ())
    assert as_table(curve).rows == ()
