"""Sequential orthogonal merging as the paper writes it, step by step in float64: slow, and the measure of ours.

Tang et al., arXiv 2501.09522, section 4: after each model the merged task vector is rescaled by a running λ so that its
length is the mean length of the task vectors so far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def clean(merged: Tensor, task_vector: Tensor, alpha: float, noise: float = 0.0) -> Tensor:
    """Return the task vector without what lies in the merged one's leading directions and on its diagonal."""
    u, sigma, vh = torch.linalg.svd(merged, full_matrices=True)
    exceeds = sigma.cumsum(0) / sigma.sum() > alpha
    r = int(exceeds.int().argmax()) if alpha < 1 else len(sigma)  # at one, rounding alone would decide
    # A singular value of zero, or of what rounding to the stored dtype left of zero, belongs to no direction.
    directions = int((sigma > max(sigma[0] * 1e-12, noise)).sum())
    projected = u.mT @ task_vector @ vh.mT
    r = min(r, directions)
    projected[:r, :r] = 0
    projected.diagonal()[:directions] = 0
    return u @ projected @ vh


def merge_step_by_step(
    base: Mapping[str, Tensor],
    models: Sequence[Mapping[str, Tensor]],
    linear: set[str],
    alpha: float,
    noise: Mapping[str, float] | None = None,
) -> tuple[dict[str, Tensor], float]:
    """Return the merged model in float64 and the last λ.

    `noise` gives, for linear weights, the singular value of a task vector up to which it is rounding.
    """
    reference = {name: tensor.double() for name, tensor in base.items()}
    merged: dict[str, Tensor] = {}
    lengths: list[float] = []
    scale = 1.0
    for number, model in enumerate(models, start=1):
        task_vectors = {name: model[name].double() - reference[name] for name in reference}
        lengths.append(_length(task_vectors))
        if number == 1:
            merged = task_vectors
            continue
        unscaled = {}
        for name, task_vector in task_vectors.items():
            usable = name in linear and bool(merged[name].any())
            zero = (noise or {}).get(name, 0.0)
            added = clean(scale * merged[name], task_vector, alpha, zero) if usable else task_vector
            unscaled[name] = scale * merged[name] + added
        scale = _length(unscaled) / (sum(lengths) / len(lengths))
        merged = {name: tensor / scale for name, tensor in unscaled.items()}
    return {name: reference[name] + merged[name] for name in reference}, scale


def _length(tensors: Mapping[str, Tensor]) -> float:
    return float(torch.cat([tensor.flatten() for tensor in tensors.values()]).norm())
