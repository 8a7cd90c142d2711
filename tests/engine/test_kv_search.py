"""The search for ranks: budgets are met, importance is found, and a step's worth is the loss's slope."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from basiscli.calibration.tokens import Windows
from basiscli.commands.kv.attention import Projector, cut_projections, set_bases, set_projections
from basiscli.commands.kv.search import GreedySearch, move_levels, spectrum, uniform
from basiscli.errors import InputError
from basiscli.progress import Silent
from basiscli.registry import Registry
from basiscli.runtime.kv_projection import attach
from basiscli.transforms import KVCompression
from tests.kv_models import make_model, random_bases, text_windows

LEVELS = 8


def projected(model: Any) -> list[Projector]:
    """Give a model attention that projects; without bases it is dense."""
    projectors = [Projector() for _ in model.model.layers]
    attach(model, projectors)
    return projectors


def matryoshka(**parameters: Any) -> KVCompression:
    method = Registry().find("compress", "matryoshka")
    found: KVCompression = method.implementation(method.validate(parameters))
    return found


def search_of(model: Any, windows: Windows | None = None, dim: int = 16, **parameters: Any) -> GreedySearch:
    projectors = projected(model)
    bases = random_bases(len(projectors), model.config.num_key_value_heads, dim)
    windows = windows or text_windows(count=12)
    held, others = windows.select(slice(0, 2)), windows.select(slice(2, None))
    return GreedySearch(model, projectors, matryoshka(**parameters), bases, others, held, LEVELS)


def even(budget: int) -> Tensor:
    return uniform((3, 2, 2), LEVELS, budget)


def loss_of(search: GreedySearch, windows: Windows, strength: Tensor) -> tuple[float, float]:
    """Return the loss and the KL divergence a token by their definitions, steps of columns at these strengths."""
    columns = strength.repeat_interleave(search.bases.shape[-1] // LEVELS, -1)
    with torch.no_grad():
        set_bases(search.projectors, None)
        p = search.model(input_ids=windows.ids).logits.double().log_softmax(-1)
        set_projections(search.projectors, cut_projections(search.bases, columns))
        q = search.model(input_ids=windows.ids).logits.double().log_softmax(-1)
        set_bases(search.projectors, None)
    counted = windows.labels != -100
    kl = float((p.exp() * (p - q)).sum(-1)[counted].mean())
    nll = -float(q.gather(-1, windows.labels.clamp_min(0)[..., None]).squeeze(-1)[counted].mean())
    share = search.method.parameters.kl_weight
    return share * kl + (1 - share) * nll, kl


def kept(levels: Tensor) -> Tensor:
    return (torch.arange(LEVELS) < levels[..., None]).float()


def uneven_model() -> Any:
    """Return a model in which layer 1 says nothing, nor do the query heads of KV head 0 in layer 0."""
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[0].self_attn.o_proj.weight[:, : 2 * 16].zero_()
    return model


# Without the model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 2, 1), (3, 2, 2), (30, 2, 3)])
def test_uniform_ranks_meet_every_budget_and_differ_by_one_at_most(shape: tuple[int, ...]) -> None:
    count = math.prod(shape)
    for budget in range(count, count * LEVELS + 1, max(1, count // 7)):
        found = uniform(shape, LEVELS, budget)
        assert found.shape == shape
        assert int(found.sum()) == budget
        assert int(found.min()) >= 1
        assert int(found.max()) <= LEVELS
        assert int(found.max() - found.min()) <= 1


def test_what_uniform_ranks_leave_over_is_spread_over_the_layers() -> None:
    layers = uniform((6, 2, 2), LEVELS, 24 * 3 + 6).sum((1, 2))
    assert layers.tolist() == [13] * 6


def falling_energy(*shape: int, seed: int = 0) -> Tensor:
    energy = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return energy.sort(-1, descending=True).values


def test_ranks_by_the_spectrum_keep_the_most_energy_of_all_choices() -> None:
    energy, levels = falling_energy(1, 2, 2, 8), 4
    share = energy.double().flatten(0, 2).unflatten(-1, (levels, 2)).sum(-1)
    share = share / share.sum(-1, keepdim=True)
    kept = share.cumsum(-1)
    for budget in range(4, 17):
        choices = [c for c in itertools.product(range(1, levels + 1), repeat=4) if sum(c) == budget]
        best = max(sum(float(kept[entry, level - 1]) for entry, level in enumerate(choice)) for choice in choices)
        found = spectrum(energy, levels, budget)
        assert found.shape == (1, 2, 2)
        assert int(found.sum()) == budget
        assert int(found.min()) >= 1
        got = sum(float(kept[entry, level - 1]) for entry, level in enumerate(found.flatten().tolist()))
        assert got == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("levels", [1, 2, 8])
def test_ranks_by_the_spectrum_meet_every_budget(levels: int) -> None:
    energy = falling_energy(3, 2, 2, 16)
    for budget in range(12, 12 * levels + 1):
        found = spectrum(energy, levels, budget)
        assert int(found.sum()) == budget
        assert 1 <= int(found.min()) <= int(found.max()) <= levels


def test_loud_heads_count_no_more_than_quiet_ones() -> None:
    energy = falling_energy(2, 2, 2, 16)
    louder = energy * torch.logspace(-6, 6, 8).view(2, 2, 2, 1)
    assert torch.equal(spectrum(louder, LEVELS, 30), spectrum(energy, LEVELS, 30))


def test_dead_heads_get_the_least_rank() -> None:
    energy = falling_energy(2, 2, 2, 16)
    energy[0, 1, 0] = 0
    assert int(spectrum(energy, LEVELS, 40)[0, 1, 0]) == 1


# With the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [12, 13, 50, 95, 96])
def test_the_greedy_search_meets_the_budget(budget: int) -> None:
    search = search_of(make_model())
    found = search.run([even(budget)], Silent())
    assert int(found.levels.sum()) == budget
    assert 1 <= int(found.levels.min()) <= int(found.levels.max()) <= LEVELS
    loss, kl = loss_of(search, search.held, kept(found.levels))
    assert found.loss == pytest.approx(loss, rel=1e-4)
    assert found.divergence == pytest.approx(kl, rel=1e-3, abs=1e-6)
    assert all(projector.key is None for projector in search.projectors)


@pytest.mark.parametrize("budget", [24, 37, 60, 70])
def test_where_heads_differ_in_importance_the_greedy_search_beats_uniform_ranks(budget: int) -> None:
    search = search_of(uneven_model(), kl_weight=1.0)
    found = search.run([even(budget)], Silent())
    assert found.divergence < 0.7 * loss_of(search, search.held, kept(even(budget)))[1]


def test_it_takes_from_what_does_not_matter() -> None:
    """Layer 1's ranks and those of head 0 in layer 0 change nothing; 46 steps are too few for the others."""
    search = search_of(uneven_model(), kl_weight=1.0)
    idle = torch.zeros(3, 2, 2, dtype=torch.bool)
    idle[1] = True
    idle[0, :, 0] = True
    found = search.run([even(46)], Silent())
    assert (found.levels[idle] == 1).all()
    assert int(found.levels[~idle].sum()) == 40


@pytest.mark.parametrize("budget", [24, 50, 80])
def test_it_is_never_worse_than_where_it_starts(budget: int) -> None:
    search = search_of(make_model())
    other = even(budget).clone()
    other[0, 0, 0] += 1
    other[2, 1, 1] -= 1
    found = search.run([even(budget), other], Silent())
    assert found.loss <= min(loss_of(search, search.held, kept(start))[0] for start in (even(budget), other)) + 1e-6


def test_the_same_is_found_again() -> None:
    first, second = (search_of(make_model()).run([even(50)], Silent()) for _ in range(2))
    assert torch.equal(first.levels, second.levels)
    assert (first.loss, first.divergence) == (second.loss, second.divergence)


@pytest.mark.parametrize("step", [-1, 0])
def test_the_difference_of_a_step_is_the_losss_slope_at_half_its_strength(step: int) -> None:
    search = search_of(make_model())
    levels = torch.randint(2, LEVELS, (3, 2, 2), generator=torch.Generator().manual_seed(0))
    batch = search.held
    found = search._differences(batch, search._logits(batch, None), levels + step)
    half = kept(levels + step) + 0.5 * (torch.arange(LEVELS) == (levels + step)[..., None])
    for entry in torch.ones(3, 2, 2).nonzero().tolist():
        slopes = []
        for sign in (1, -1):
            moved = half.clone()
            moved[(*entry, int(levels[tuple(entry)]) + step)] += sign * 0.05
            slopes.append(loss_of(search, batch, moved)[0])
        assert float(found[tuple(entry)]) == pytest.approx((slopes[1] - slopes[0]) / 0.1, rel=0.05, abs=2e-5)


def test_an_entry_without_such_a_step_has_no_difference() -> None:
    search = search_of(make_model())
    found = search._differences(search.held, search._logits(search.held, None), torch.full((3, 2, 2), LEVELS))
    assert (found == 0).all()


def test_padding_does_not_count() -> None:
    """What stands in the padding changes nothing."""
    whole = text_windows(count=8)
    ids, mask = whole.ids.clone(), torch.ones_like(whole.ids)
    mask[1::2, 24:] = 0
    labels = torch.where((mask * mask.roll(-1, 1)) == 1, whole.labels, -100)
    found = []
    for rubbish in (0, 7):
        padded = torch.where(mask == 1, ids, rubbish)
        found.append(search_of(make_model(), Windows(padded, labels, mask, "words", "")).run([even(50)], Silent()))
    assert torch.equal(found[0].levels, found[1].levels)
    assert found[0].loss == pytest.approx(found[1].loss, rel=1e-5)


@pytest.mark.parametrize("place", [slice(0, 2), slice(2, None)], ids=["held", "rounds"])
def test_windows_that_do_not_count(place: slice) -> None:
    windows = text_windows(count=6)
    windows.labels[place] = -100
    with pytest.raises(InputError, match="no token of the search's windows") as caught:
        search_of(make_model(), windows).run([even(50)], Silent())
    assert "--search spectrum" in str(caught.value.remedy)


def test_single_windows_that_do_not_count_are_passed_over() -> None:
    windows = text_windows(count=8)
    windows.labels[[0, 3, 5]] = -100
    assert math.isfinite(search_of(make_model(), windows).run([even(50)], Silent()).loss)


# Exchanges ------------------------------------------------------------------------------------------------------------


def test_the_cheapest_steps_go_where_they_gain_most() -> None:
    levels = torch.tensor([4, 4, 4, 4, 1, 8])
    cost, gain = torch.tensor([0.1, 5, 0.3, 5, 0.0, 5]), torch.tensor([0.0, 0.9, 0, 0.2, 0, 7.0])
    new, moved = move_levels(levels, cost, gain, 5, LEVELS)
    assert new.tolist() == [3, 5, 4, 4, 1, 8]  # 0.3 is not less than 0.2; the last is full, the fifth at its least
    assert moved == 1
    assert cost[1] == pytest.approx(0.9)
    assert gain[0] == pytest.approx(0.1)
    assert torch.isnan(cost[0])
    assert torch.isnan(gain[1])
    assert levels.tolist() == [4, 4, 4, 4, 1, 8]


def test_an_entry_that_is_both_cheap_and_gains_is_raised() -> None:
    levels = torch.tensor([4, 4, 4])
    new, moved = move_levels(levels, torch.tensor([-1.0, 0.2, 0.5]), torch.tensor([2.0, 0.3, 0.1]), 1, LEVELS)
    assert moved == 1
    assert new.tolist() == [5, 3, 4]


def test_no_exchange_is_worth_it() -> None:
    levels = torch.full((2, 2), 3)
    new, moved = move_levels(levels, torch.full((2, 2), 0.5), torch.full((2, 2), 0.4), 4, LEVELS)
    assert moved == 0
    assert torch.equal(new, levels)


def test_so_many_exchanges_at_most() -> None:
    levels, rising = torch.full((20,), 4), torch.arange(20.0)
    new, moved = move_levels(levels, rising.clone(), rising.clone(), 3, LEVELS)
    assert moved == 3
    assert new.tolist() == [3] * 3 + [4] * 14 + [5] * 3
