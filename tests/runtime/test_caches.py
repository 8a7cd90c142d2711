"""The two names of a KV cache; the other tests meet the one that the installed transformers has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from basiscli.runtime.caches import cache_of, given_cache


def old(input_ids: Any, past_key_values: Any = None, **more: Any) -> None: ...


def new(input_ids: Any, cache: Any = None, **more: Any) -> None: ...


@pytest.mark.parametrize(("forward", "name"), [(old, "past_key_values"), (new, "cache")])
def test_a_cache_is_given_under_the_name_that_the_model_has(forward: Any, name: str) -> None:
    assert given_cache(SimpleNamespace(forward=forward), "it") == {name: "it"}


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_is_found_under_either_name(name: str) -> None:
    assert cache_of({"logits": 0, name: "it"}) == "it"
    assert cache_of({"logits": 0}) is None
