"""Model Stock."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from basiscli import Blocks, transform

if TYPE_CHECKING:
    from torch import Tensor

FilterWise = Annotated[bool, Field(description="an angle for each row instead of one for the tensor")]

_NO_LENGTH = 1e-6  # a product of two lengths below this has no angle
_SINGULAR = 1e-6


def _ratio(blocks: Blocks, filter_wise: FilterWise) -> float | None:
    """Return the interpolation ratio of a tensor; None where each row has its own, found row by row."""
    from basiscli.linalg.sphere import gram_of

    if filter_wise and len(blocks.shape) > 1:
        return None
    return float(_interpolation(gram_of(blocks)))


def _interpolation(gram: Tensor) -> Tensor:
    """Return t = k cos θ / (1 + (k − 1) cos θ) for the mean cosine between k task vectors, given inner products.

    Args:
        gram: float64 [k, k, …].
    """
    import torch

    count = len(gram)
    lengths = torch.stack([gram[i, i].clamp(min=0).sqrt() for i in range(count)])
    cosines = [
        (gram[i, j] / (lengths[i] * lengths[j]).clamp(min=_NO_LENGTH)).clamp(-1, 1)
        for i in range(count)
        for j in range(i + 1, count)
    ]
    cosine = torch.stack(cosines).mean(dim=0)
    divisor = 1 + (count - 1) * cosine
    singular = divisor.abs() < _SINGULAR  # task vectors that cancel: the base is all there is to keep
    return torch.where(singular, 0.0, count * cosine / torch.where(singular, 1.0, divisor))


@transform(
    "merge",
    rowwise=True,
    measure=_ratio,
    models=(2, None),
    source="Jang et al., 'Model Stock: All we need is just a few fine-tuned models', arXiv 2403.19522, eq. 4",
)
def model_stock(
    base: Tensor, others: list[Tensor], measured: float | None, *, filter_wise: FilterWise = False
) -> Tensor:
    """Go from the base towards the average of the models, the further the smaller the angle between them.

    W + t · mean Tᵢ, t = k cos θ / (1 + (k − 1) cos θ), θ the mean angle between the k task vectors of a tensor: what
    they agree on is kept and what is noise is averaged towards the base.
    """
    import torch

    task_vectors = [other - base for other in others]
    ratio: Tensor | float | None = measured
    if ratio is None:
        wide = torch.stack(task_vectors).double()
        gram = torch.stack([(wide * vector).sum(dim=-1, keepdim=True) for vector in wide])
        ratio = _interpolation(gram).to(base.dtype)
    mean = task_vectors[0]
    for task_vector in task_vectors[1:]:
        mean.add_(task_vector)
    return mean.mul_(ratio / len(others)).add_(base)
