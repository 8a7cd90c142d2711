"""Timing of greedy decoding."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from basiscli.progress import Progress
from basiscli.runtime.caches import cache_of, given_cache

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK = 512  # tokens of a prompt that are read at a time before decoding is timed


def speeds_of(
    models: list[Any], ids: Tensor, contexts: Sequence[int], new_tokens: int, progress: Progress
) -> list[dict[int, float]]:
    """Time greedy decoding after prompts of several lengths; the models take turns, and the median step counts."""
    found: list[dict[int, float]] = [{} for _ in models]
    if contexts:
        progress.start("timing", len(contexts), sum(contexts) * len(models), "tokens")
    for context in contexts:
        prompt = ids.repeat(-(-context // len(ids)))[:context][None]
        steps = [_Decoding(one, prompt) for one in models]
        times: list[list[float]] = [[] for _ in models]
        for _ in range(new_tokens):
            for one, seconds in zip(steps, times, strict=True):
                seconds.append(one.step())
        for number, seconds in enumerate(times):
            found[number][context] = 1 / sorted(seconds)[len(seconds) // 2]
        progress.advance(context * len(models))
    return found


class _Decoding:
    """Greedy decoding of one text, a token at a time."""

    def __init__(self, model: Any, prompt: Tensor) -> None:
        self.model, self.cache, last = model, None, None
        for chunk in prompt.split(_CHUNK, 1):
            last = model(input_ids=chunk, use_cache=True, logits_to_keep=1, **given_cache(model, self.cache))
            self.cache = cache_of(last)
        assert last is not None
        self.token = last.logits[:, -1:].argmax(-1)

    def step(self) -> float:
        """Decode one token; return the seconds it took."""
        inputs = {"input_ids": self.token, "use_cache": True, **given_cache(self.model, self.cache)}
        wait = _waiting(self.token)
        wait()
        started = time.perf_counter()
        out = self.model(**inputs)
        self.token = out.logits[:, -1:].argmax(-1)
        wait()
        return time.perf_counter() - started


def _waiting(tensor: Tensor) -> Callable[[], None]:
    """Return what waits until a device has done what it was given."""
    import torch

    return torch.cuda.synchronize if tensor.is_cuda else lambda: None
