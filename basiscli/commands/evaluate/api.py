"""Measuring a model, alone or against another: quality on a text and in tasks, size of the cache, speed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from basiscli.cli.keywords import keywords
from basiscli.commands.evaluate.decoding import speeds_of
from basiscli.commands.evaluate.options import EvalOptions
from basiscli.commands.evaluate.tasks import TaskScore, find_tasks, number_prefix
from basiscli.errors import InputError, UsageError
from basiscli.progress import Progress, Silent
from basiscli.runtime.caches import cache_of, given_cache

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ModelFigures:
    """What one model does on the text."""

    model: str
    perplexity: float
    accuracy: float
    """Share of tokens that the model ranks first, given those before."""
    cache_bytes_per_token: float
    """Measured: bytes of the cache's tensors after a prompt, a token."""
    decode_tokens_per_second: dict[int, float] = field(default_factory=dict)
    """Greedy decoding of one text, by the number of tokens before it."""
    tasks: list[TaskScore] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluation:
    """Figures of a model and of the one it is held against, on the same tokens."""

    model: ModelFigures
    against: ModelFigures | None
    kl: float | None
    """Mean over tokens of KL(against ‖ model), in nats."""
    agreement: float | None
    """Share of tokens where both models rank the same token first."""
    tokens: int
    """Tokens that were predicted."""
    text: str
    prefill: str
    device: str

    @property
    def numbers(self) -> dict[str, float]:
        """Named numbers, as gates take them."""
        own = {
            "perplexity": self.model.perplexity,
            "accuracy": self.model.accuracy,
            "cache_bytes_per_token": self.model.cache_bytes_per_token,
            **{f"decode_tokens_per_second_{n}": x for n, x in self.model.decode_tokens_per_second.items()},
            **{score.name: score.value for score in self.model.tasks},
            **{f"{score.name}_stderr": score.stderr for score in self.model.tasks if score.stderr is not None},
        }
        if self.against is None:
            return own
        other = self.against
        own |= {
            "perplexity_increase": self.model.perplexity / other.perplexity - 1,
            "accuracy_kept": self.model.accuracy / other.accuracy if other.accuracy else math.nan,
            "cache_kept": self.model.cache_bytes_per_token / other.cache_bytes_per_token,
            "kl": self.kl or 0.0,
            "agreement": self.agreement or 0.0,
        }
        for context, speed in self.model.decode_tokens_per_second.items():
            own[f"decode_speedup_{context}"] = speed / other.decode_tokens_per_second[context]
        for score, reference in zip(self.model.tasks, other.tasks, strict=True):
            own[f"{score.name}_change"] = score.value - reference.value
        return own

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return asdict(self) | {"numbers": self.numbers}


def number_names(*, pair: bool, contexts: Sequence[int], tasks: Sequence[str] = ()) -> set[str]:
    """Return the names of the numbers that an evaluation will give, alone or against another model.

    Only the work tells a task's metrics: of their names a pattern is there, `task_NAME_*`.
    """
    names = {"perplexity", "accuracy", "cache_bytes_per_token"}
    names |= {"perplexity_increase", "accuracy_kept", "cache_kept", "kl", "agreement"} if pair else set()
    timed = ["decode_tokens_per_second", *(["decode_speedup"] if pair else [])]
    names |= {f"{number_prefix(task)}*" for task in tasks}
    return names | {f"{name}_{context}" for name in timed for context in contexts}


@keywords(EvalOptions)
def evaluate(model: str | Path, *, progress: Progress | None = None, **options: Any) -> Evaluation:
    """Measure a model on a text, and how it differs from another.

    Args:
        model: a folder or a Hub id; a compressed model is measured with its small cache.
        progress: what to tell how far the work is.
        **options: by name:

    Raises:
        UsageError, InputError, HubError, ResourceError: see `basiscli.errors`.
    """
    return run(EvalOptions.of(model=model, **options), progress or Silent())


def numbers_of(options: EvalOptions) -> set[str]:
    """Return the names of the numbers that an evaluation with these options will give."""
    return number_names(pair=options.against is not None, contexts=options.contexts, tasks=options.tasks)


def run(options: EvalOptions, progress: Progress) -> Evaluation:
    """Do what the options ask for."""
    model, text, against, prefill = options.model, options.text, options.against, options.prefill
    length, windows, new_tokens, contexts = options.length, options.windows, options.new_tokens, options.contexts
    tasks, device = options.tasks, options.device
    for name, value, least in (("length", length, 16), ("windows", windows, 1), ("new_tokens", new_tokens, 1)):
        if value < least:
            raise UsageError(f"{name} {value}", remedy=f"at least {least}")
    if tasks and prefill == "exact":  # the harness scores whole prompts, which would never see the cache
        raise UsageError("tasks with prefill 'exact'", remedy="leave --prefill compressed")
    asked = find_tasks(tasks, folder=options.task_path, limit=options.task_limit, few_shot=options.few_shot)
    import torch

    from basiscli.calibration.tokens import read_windows
    from basiscli.engine.devices import choose_device
    from basiscli.hub.resolve import resolve
    from basiscli.runtime.load import load, load_tokenizer

    shown, place = progress, choose_device(device)
    specs = [str(model), *([str(against)] if against is not None else [])]
    sources = [resolve(spec) for spec in specs]
    tokenizers = [load_tokenizer(source.folder) for source in sources] if asked else []
    loaded = [load(source.folder, device=place, prefill=prefill)[0] for source in sources]
    sizes = [one.config.get_text_config().vocab_size for one in loaded]
    if len(set(sizes)) > 1:
        raise InputError(
            f"the vocabularies differ: {sizes[0]} and {sizes[1]} tokens",
            file=sources[1].path,
            remedy="give a model with the same tokenizer",
        )
    most = min(one.config.get_text_config().max_position_embeddings for one in loaded) - new_tokens
    for context in contexts:
        if not 1 <= context <= most:
            raise UsageError(f"a context of {context} tokens", remedy=f"1 to {most} for this model")
    found = read_windows(text, lambda: load_tokenizer(sources[0].folder), length, min(sizes))
    chosen = found.spread(windows)
    try:
        with torch.no_grad():
            sums = _quality(loaded, chosen, place, prefill == "exact", shown)
            caches = [_cache_bytes(one, chosen.ids[:1].to(place)) for one in loaded]
            speeds = speeds_of(loaded, chosen.ids.flatten().to(place), contexts, new_tokens, shown)
            scores: list[list[TaskScore]] = [[] for _ in loaded]
            if asked:
                shown.start("tasks", len(tasks) * len(loaded), len(tasks) * len(loaded), "tasks")
                scores = [asked.score(*one, shown) for one in zip(loaded, tokenizers, strict=True)]
    finally:
        shown.stop()
    figures = [
        ModelFigures(source.spec, math.exp(min(nll / sums.tokens, 700)), hits / sums.tokens, cache, speed, scored)
        for source, nll, hits, cache, speed, scored in zip(
            sources, sums.nll, sums.hits, caches, speeds, scores, strict=True
        )
    ]
    pair = len(figures) > 1
    return Evaluation(
        figures[0],
        figures[1] if pair else None,
        sums.kl / sums.tokens if pair else None,
        sums.agree / sums.tokens if pair else None,
        sums.tokens,
        found.name,
        prefill,
        str(place),
    )


@dataclass
class _Sums:
    nll: list[float]
    hits: list[int]
    kl: float = 0.0
    agree: int = 0
    tokens: int = 0


def _quality(models: list[Any], windows: Any, device: Any, halves: bool, progress: Progress) -> _Sums:
    """Add up what the models say about the windows, one window at a time."""
    sums = _Sums([0.0] * len(models), [0] * len(models))
    progress.start("scoring", len(windows), windows.ids.numel(), "tokens")
    for place in range(len(windows)):
        one = windows.select([place])
        inputs = {name: x.to(device) for name, x in one.inputs.items()}
        labels = one.labels.to(device)
        if halves:
            labels[:, : labels.shape[1] // 2] = -100
        counted = labels != -100
        wanted = labels[counted]
        logs = []
        for number, model in enumerate(models):
            logits = (_in_halves if halves else _at_once)(model, inputs)
            log = logits[counted].float().log_softmax(-1)
            sums.nll[number] -= float(log.gather(-1, wanted[:, None]).sum())
            sums.hits[number] += int((log.argmax(-1) == wanted).sum())
            logs.append(log)
        sums.tokens += len(wanted)
        if len(logs) > 1:
            sums.kl += float((logs[1].exp() * (logs[1] - logs[0])).sum())
            sums.agree += int((logs[0].argmax(-1) == logs[1].argmax(-1)).sum())
        progress.advance(int(counted.numel()))
    if not sums.tokens:
        raise InputError("no token of the text counts", remedy="give text, or tokens whose labels are not all −100")
    return sums


def _at_once(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits


def _in_halves(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return logits of a window whose second half sees the first through the cache."""
    import torch

    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    half = ids.shape[1] // 2
    first = model(input_ids=ids[:, :half], attention_mask=None if mask is None else mask[:, :half], use_cache=True)
    rest = model(input_ids=ids[:, half:], attention_mask=mask, use_cache=True, **given_cache(model, cache_of(first)))
    return torch.cat([first.logits, rest.logits], 1)


def _cache_bytes(model: Any, ids: Tensor) -> float:
    """Return the bytes a token takes in the cache, from the tensors that are there after a prompt."""
    cache = cache_of(model(input_ids=ids, use_cache=True, logits_to_keep=1))
    stored = [x for layer in cache.layers for x in (layer.keys, layer.values) if x is not None]
    total: int = sum(x.numel() * x.element_size() for x in stored)
    return total / int(cache.get_seq_length())
