"""The search for ranks: budgets are met, importance is found, and a trial from a layer on is the whole model's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from basiscli.calibration.tokens import Windows
from basiscli.engine.kv_attention import Projector, set_bases
from basiscli.engine.kv_search import GreedySearch, LayerReplay, spectrum, uniform
from basiscli.engine.local import Silent
from basiscli.errors import InputError
from basiscli.runtime.kv_projection import attach
from tests.kv_models import ARCHITECTURES, llama, make_model, random_bases, some_ids, text_windows

LEVELS = 8


def projected(model: Any) -> list[Projector]:
    """Give a model attention that projects; without bases it is dense."""
    projectors = [Projector() for _ in model.model.layers]
    attach(model, projectors)
    return projectors


def search_of(model: Any, windows: Windows | None = None, batch: int = 1, dim: int = 16) -> GreedySearch:
    projectors = projected(model)
    bases = random_bases(len(projectors), model.config.num_key_value_heads, dim)
    return GreedySearch(model, projectors, bases, windows or text_windows(count=3), LEVELS, batch)


def divergence(search: GreedySearch, levels: Tensor) -> float:
    """Return the mean KL divergence on the second half of every window, by its definition, in float64."""
    ids, labels = search.windows.ids, search.windows.labels
    half = -(-ids.shape[1] // 2)
    with torch.no_grad():
        set_bases(search.projectors, None)
        p = search.model(input_ids=ids).logits[:, -half:].double().log_softmax(-1)
        set_bases(search.projectors, search.bases, levels * (search.bases.shape[-1] // LEVELS))
        q = search.model(input_ids=ids).logits[:, -half:].double().log_softmax(-1)
        set_bases(search.projectors, None)
    counted = labels[:, -half:] != -100
    return float((p.exp() * (p - q)).sum(-1)[counted].mean())


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
    (found,) = search.run([budget], Silent())
    assert int(found.levels.sum()) == budget
    assert 1 <= int(found.levels.min()) <= int(found.levels.max()) <= LEVELS
    assert found.divergence == pytest.approx(divergence(search, found.levels), rel=1e-3, abs=1e-6)
    assert all(projector.key is None for projector in search.projectors)


@pytest.mark.parametrize("budget", [24, 37, 60, 70])
def test_where_heads_differ_in_importance_the_greedy_search_beats_uniform_ranks(budget: int) -> None:
    search = search_of(uneven_model())
    (found,) = search.run([budget], Silent())
    assert found.divergence < 0.7 * divergence(search, uniform((3, 2, 2), LEVELS, budget))


def test_the_greedy_search_takes_from_what_does_not_matter_first() -> None:
    search = search_of(uneven_model())
    idle = torch.zeros(3, 2, 2, dtype=torch.bool)
    idle[1] = True
    idle[0, :, 0] = True
    (found,) = search.run([96 - 6 * 7], Silent())
    assert (found.levels[idle] == 1).all()
    assert (found.levels[~idle] == LEVELS).all()
    assert found.divergence == pytest.approx(0, abs=1e-5)


def test_several_budgets_in_one_search_are_found_as_each_alone() -> None:
    """With fewer than 40 entries a round lowers one, so every budget is on the way to the next."""
    model = make_model()
    together = search_of(model).run([70, 20, 45, 96], Silent())
    assert [int(found.levels.sum()) for found in together] == [96, 70, 45, 20]
    assert torch.equal(together[0].levels, torch.full((3, 2, 2), LEVELS))
    for found in together:
        (alone,) = search_of(model).run([int(found.levels.sum())], Silent())
        assert torch.equal(alone.levels, found.levels)
        assert alone.divergence == found.divergence


def test_trials_side_by_side_find_the_same() -> None:
    one, four = search_of(make_model()), search_of(make_model(), batch=4)
    (first,), (second,) = one.run([50], Silent()), four.run([50], Silent())
    assert torch.equal(first.levels, second.levels)
    assert first.divergence == pytest.approx(second.divergence, rel=1e-4)
    assert one.trials == four.trials


def test_an_entrys_cost_is_what_the_whole_model_loses() -> None:
    search = search_of(make_model(), batch=3)
    levels = torch.full((3, 2, 2), 5)
    search.bases = search.bases.clone()
    with torch.no_grad():
        set_bases(search.projectors, None)
        search._learn_from(search.model(**search._inputs(), use_cache=False).logits)
        set_bases(search.projectors, search.bases, levels * 2)
        replay = LayerReplay(search.model, search.projectors)
        search._divergence = search._divergence_of(replay.record(search._inputs()))
        entries = [tuple(index) for index in torch.ones(3, 2, 2).nonzero().tolist()]
        costs = search._costs(entries, levels, replay, Silent())
    present = divergence(search, levels)
    assert set(costs) == set(entries)
    for entry in entries:
        lower = levels.clone()
        lower[entry] -= 1
        assert costs[entry] == pytest.approx(divergence(search, lower) - present, abs=2e-5)


class OneIsDear(GreedySearch):
    """Lowers one entry only when all others are at their least."""

    def _costs(self, entries: Sequence[tuple[int, ...]], levels: Tensor, *_: Any) -> dict[tuple[int, ...], float]:
        return {entry: 1.0 if entry == (2, 1, 3) else -float(levels[entry]) for entry in entries}


def test_the_least_budget_is_met_though_one_entry_alone_is_left_to_lower() -> None:
    """With 40 entries a round lowers two, and in the end there is only one."""
    model = llama(num_hidden_layers=5, num_key_value_heads=4).eval().requires_grad_(False)
    projectors = projected(model)
    search = OneIsDear(model, projectors, random_bases(5, 4, 8), text_windows(count=1), LEVELS)
    found = search.run([40, 43], Silent())
    assert [int(one.levels.sum()) for one in found] == [43, 40]
    assert int(found[0].levels[2, 1, 3]) == 4
    assert (found[1].levels == 1).all()


def test_padding_does_not_count() -> None:
    """Two windows, one of them padded, find what the same tokens find without padding."""
    whole = text_windows(count=2)
    ids, mask = whole.ids.clone(), torch.ones_like(whole.ids)
    mask[1, 24:] = 0
    labels = torch.where((mask * mask.roll(-1, 1)) == 1, whole.labels, -100)
    found = []
    for rubbish in (0, 7):
        padded = torch.where(mask == 1, ids, rubbish)
        (one,) = search_of(make_model(), Windows(padded, labels, mask, "words", "")).run([50], Silent())
        found.append(one)
    assert torch.equal(found[0].levels, found[1].levels)
    assert found[0].divergence == pytest.approx(found[1].divergence, rel=1e-4)


def test_windows_whose_second_halves_do_not_count() -> None:
    windows = text_windows(count=2)
    windows.labels[:, 10:] = -100
    with pytest.raises(InputError, match="no token in the second halves") as caught:
        search_of(make_model(), windows).run([50], Silent())
    assert "--search spectrum" in str(caught.value.remedy)


# Trials from a layer on -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("cut", [False, True])
def test_from_every_layer_on_the_logits_are_the_models(name: str, cut: bool) -> None:
    model = make_model(name)
    projectors = projected(model)
    config, ids = model.config, some_ids(count=2, length=30)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    replay = LayerReplay(model, projectors)
    with torch.no_grad():
        if cut:
            bases = random_bases(len(projectors), config.num_key_value_heads, dim)
            set_bases(projectors, bases, torch.full(bases.shape[:3], dim // 2))
        expected = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(replay.record({"input_ids": ids}), expected)
        assert replay._exact
        assert len(replay.layers) == len(projectors)
        for layer in range(len(projectors)):
            for copies in (1, 3):
                found = replay.run(layer, copies)
                torch.testing.assert_close(found, expected.repeat(copies, 1, 1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected)  # its layers are back


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_change_in_a_layer_is_seen_from_that_layer_on(name: str) -> None:
    model = make_model(name)
    projectors = projected(model)
    config, ids = model.config, some_ids(count=1, length=30)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bases = random_bases(len(projectors), config.num_key_value_heads, dim)
    full = torch.full(bases.shape[:3], dim)
    replay = LayerReplay(model, projectors)
    with torch.no_grad():
        set_bases(projectors, bases, full)
        before = replay.record({"input_ids": ids})
        last = len(projectors) - 1
        cut = full.clone()
        cut[last] = 1
        set_bases(projectors, bases, cut)
        expected = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(replay.run(last, 1), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(expected, before, rtol=1e-2, atol=1e-2)


def test_a_model_that_does_something_to_embeddings_runs_as_a_whole() -> None:
    model = make_model()
    projectors = projected(model)

    def scale(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = kwargs.get("inputs_embeds")
        return args, kwargs if given is None else kwargs | {"inputs_embeds": 3 * given}

    model.model.register_forward_pre_hook(scale, with_kwargs=True)
    replay = LayerReplay(model, projectors)
    ids = some_ids(count=2, length=12)
    with torch.no_grad():
        expected = replay.record({"input_ids": ids, "logits_to_keep": 5})
        assert replay._exact is False
        for layer in range(3):
            torch.testing.assert_close(replay.run(layer, 2), expected.repeat(2, 1, 1), rtol=1e-4, atol=1e-4)
