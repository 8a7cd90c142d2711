"""One model as it is, or scaled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from basiscli import transform

if TYPE_CHECKING:
    from torch import Tensor

Scale = Annotated[float, Field(description="what every tensor is multiplied with")]


@transform("merge", elementwise=True, models=(1, 1), source="mergekit's passthrough")
def passthrough(others: list[Tensor], *, scale: Scale = 1.0) -> Tensor:
    """Pass one model's tensors through, multiplied with a number.

    For recipes that stack layers of several models, and to write a checkpoint in another dtype or shard size.
    """
    return others[0] * scale
