"""Task arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING

from basiscli import History, transform

if TYPE_CHECKING:
    from torch import Tensor


def _onto_weight(history: History) -> float:
    return 1.0 / float(history.parameters["lambda"])


@transform(
    "merge",
    elementwise=True,
    onto_weight=_onto_weight,
    source="Ilharco et al., 'Editing Models with Task Arithmetic', arXiv 2212.04089",
)
def task_arithmetic(base: Tensor, others: list[Tensor], weights: list[float], *, lambda_: float = 1.0) -> Tensor:
    """Sum of task vectors on the base: W + λ Σ wᵢ (Wᵢ − W).

    Keeps more of each fine-tune than an average and lets them interfere; λ below 1 (0.3 to 0.5 for several models) is
    usual. A negative weight unlearns.
    """
    merged = base.clone()
    for other, weight in zip(others, weights, strict=True):
        merged.add_(other - base, alpha=lambda_ * weight)
    return merged
