"""NOLA: an adapter that trains coefficients of random matrices, and stores them and a seed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from basiscli import transform

if TYPE_CHECKING:
    from torch import Tensor

    from basiscli.linalg.randbasis import RandomBases


@transform("init", trains="coefficients", source="Koohpayegani et al., 'NOLA', arXiv 2310.02556")
def nola(
    random: tuple[RandomBases, RandomBases],
    *,
    bases: Annotated[
        int, Field(ge=1, description="random matrices a factor: a module trains twice as many numbers")
    ] = 1024,
) -> tuple[Tensor, Tensor]:
    """Factors that are combinations of random matrices: a of variance 1, b zero, so that ΔW = 0."""
    import torch

    from basiscli.linalg.nola import start_of

    of_a, of_b = random
    return start_of(of_a), torch.zeros(of_b.count)
