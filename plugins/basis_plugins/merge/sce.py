"""SCE: select, calculate, erase."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, NamedTuple

from pydantic import Field

from basiscli import Blocks, transform

if TYPE_CHECKING:
    from torch import Tensor

    from basiscli.linalg.selection import Cut

TopK = Annotated[float, Field(gt=0, le=1, description="share of elements kept, those that differ most between models")]


class _Measured(NamedTuple):
    cut: Cut | None
    """Threshold of the elements with the largest variance; None to keep all."""
    weights: list[float]


def _select_and_weigh(blocks: Blocks, weights: list[float], select_topk: TopK) -> _Measured:
    from basiscli.linalg.consensus import variance
    from basiscli.linalg.selection import NOTHING, largest

    def variances() -> Iterator[tuple[int, list[Tensor]]]:
        for block in blocks:
            yield block.start, [variance(block.task_vectors)]

    cut: Cut | None = None
    if select_topk < 1:
        differing = sum(int(values[0].count_nonzero()) for _, values in variances())
        wanted = int(differing * select_topk)
        cut = largest(variances, [[wanted]])[0][0] if wanted else NOTHING
    energies = [0.0] * len(weights)
    for block in blocks:
        for index, task_vector in enumerate(_selected(block.task_vectors, cut, block.start)):
            energies[index] += float(task_vector.reshape(-1) @ task_vector.reshape(-1))
    total = sum(energies) / max(1, blocks.count)
    # Next to nothing in any task vector: no weight is better than another.
    equal = total < 1e-6
    return _Measured(cut, [1 / len(weights) if equal else e / sum(energies) for e in energies])


def _selected(task_vectors: list[Tensor], cut: Cut | None, start: int) -> list[Tensor]:
    from basiscli.linalg.consensus import variance

    if cut is None:
        return task_vectors
    mask = cut.keep(variance(task_vectors), start).sign_()
    return [task_vector.mul_(mask) for task_vector in task_vectors]


@transform(
    "merge",
    elementwise=True,
    measure=_select_and_weigh,
    source="Wan et al., 'FuseChat', arXiv 2408.07990",
)
def sce(base: Tensor, others: list[Tensor], start: int, measured: _Measured, *, select_topk: TopK = 1.0) -> Tensor:
    """Select where models differ most, weigh each tensor's models by their energy, erase minority signs.

    Of each tensor the share `select_topk` of the elements whose variance over the models is largest stays. A model's
    weight is the mean square of what stays of its task vector, as a share of all models'. At each place only models
    with the sign of the sum count, and their weights are normalised over them.
    """
    from basiscli.linalg.consensus import elected_weights, keep_majority

    kept = _selected([other - base for other in others], measured.cut, start)
    majority = keep_majority(kept)
    divisor = elected_weights(kept, measured.weights).clamp_(min=1e-6)
    total = kept[0] * measured.weights[0]
    for task_vector, weight in zip(kept[1:], measured.weights[1:], strict=True):
        total.add_(task_vector, alpha=weight)
    return total.div_(divisor).mul_(majority).add_(base)
