"""NearSwap."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from basiscli import transform

if TYPE_CHECKING:
    from torch import Tensor

Distance = Annotated[float, Field(ge=0, description="elements closer than this are taken from the second model")]


@transform(
    "merge",
    elementwise=True,
    models=(2, 2),
    source="alchemonaut, 'QuartetAnemoi-70B-t0.0001' (model card on the Hub), as in mergekit",
)
def nearswap(others: list[Tensor], *, t: Distance) -> Tensor:
    """Pull the first model towards the second, each element by at most t.

    Elements that differ by t or less become the second model's; the others move by t. A `--base` changes nothing but
    the names and the report.
    """
    first, second = others
    difference = second - first
    share = (t / difference.abs().clamp_(min=1e-6)).clamp_(0, 1)
    return difference.mul_(share).add_(first)
