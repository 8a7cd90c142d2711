"""The named numbers of reports and evaluations, and what each means: what `--fail-if` can be written over.

One table for all commands, since a name means the same in whichever report it stands.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

MEANINGS: dict[str, str] = {
    # every command that writes weights
    "tensors": "tensors written",
    "parameters": "elements of all tensors written",
    # merge
    "scale": "what multiplies the merged task vector in the end",
    "lambda": "1 / scale: the paper's λ",
    "mean_norm": "mean Frobenius norm of the models' task vectors, over the whole model",
    "models": "models merged so far, with those of an earlier merge that was continued",
    # init, extract
    "modules": "modules that have factors",
    "adapter_parameters": "numbers to train",
    "rank_least": "least rank of a module",
    "rank_most": "highest rank of a module",
    "energy": "share of the squared norm (from data: of the inputs' variance) that the factors hold, over all modules",
    "energy_least": "the same of the module where it is least",
    "error_most": "largest relative error of residual + s·B·A against the weight",
    "nf4_error": "Frobenius norm over all targets of nf4(residual) + s·B·A − W",
    "nf4_error_qlora": "the same of nf4(W) − W: what the error is without factors",
    "nf4_error_reduction": "1 − nf4_error / nf4_error_qlora",
    # compress: an adapter
    "fidelity": "share of the adapter's effect that survives: 1 − kl / kl_base, without a base of the squared norm",
    "fidelity_layers": "the same before the training on logits",
    "kl_base": "mean KL divergence of the base from the LoRA, nats a token",
    "perplexity_lora": "perplexity of the LoRA on the held-out windows",
    "perplexity_base": "perplexity of the base on them",
    "parameters_kept": "numbers of the result / numbers of the adapter",
    "bytes_kept": "bytes of the result's weights file / of the adapter's",
    # compress: the KV cache
    "cache_kept": "share of the cache's bytes that is left",
    "cache_removed": "share of the cache's bytes that is removed",
    "orthogonality_error": "largest entry of |UᵀU − I| of any basis",
    "full_rank_error": "largest difference of the logits at full rank from the dense model's, relative",
    "search_rounds": "rounds of the search for ranks",
    "search_loss": "the method's loss with the ranks found, on held-out windows",
    "search_kl": "KL divergence from the dense model with the ranks found, on held-out windows, nats a token",
    # eval
    "perplexity": "exp of the mean negative log-likelihood a token, of the model or adapter that was made",
    "accuracy": "share of tokens that the model ranks first",
    "cache_bytes_per_token": "bytes a token takes in the cache, measured",
    "perplexity_increase": "perplexity / that of the other model − 1",
    "accuracy_kept": "accuracy / that of the other model",
    "kl": "mean KL divergence from the other model (of an adapter: from the LoRA), nats a token",
    "agreement": "share of tokens where both models rank the same token first",
}
"""By name. A transform of somebody else's may add numbers of its own."""

PATTERNS: dict[str, str] = {
    "decode_tokens_per_second_N": "tokens decoded a second after N tokens",
    "decode_speedup_N": "that speed / the other model's",
    "task_NAME_METRIC": "score in a metric of lm-evaluation-harness's task NAME",
    "task_NAME_METRIC_stderr": "standard error of that score",
    "task_NAME_METRIC_change": "that score − the other model's",
}
"""Names with a number N, or a task's NAME and a METRIC, in them."""

_UNKNOWN = "a number of this method"


@dataclass(frozen=True)
class NamedNumber:
    """One number, with its name and meaning."""

    name: str
    value: float
    meaning: str


def meaning_of(name: str) -> str:
    """Return what a number means, by its name: of `decode_speedup_512`, what `decode_speedup_N` does."""
    pattern = re.sub(r"_\d+$", "_N", name)
    if found := re.fullmatch(r"task_\w+?_\w+?(_stderr|_change)?", name):
        pattern = f"task_NAME_METRIC{found[1] or ''}"
    return MEANINGS.get(name) or PATTERNS.get(pattern) or _UNKNOWN


def is_documented(name: str) -> bool:
    """Return whether a name is known here; a method of somebody else's may give numbers of its own."""
    return meaning_of(name) != _UNKNOWN


def named(*tables: Mapping[str, float]) -> list[NamedNumber]:
    """Return the numbers of tables `{name: value}` with their meanings; of a name in two, the later table's."""
    values: dict[str, float] = {}
    for table in tables:
        values |= table
    return [NamedNumber(name, value, meaning_of(name)) for name, value in values.items()]


def documented() -> Iterable[tuple[str, str]]:
    """Return every known name, or pattern of names, with its meaning."""
    return [*MEANINGS.items(), *PATTERNS.items()]
