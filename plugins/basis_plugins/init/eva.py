"""EVA: A spans the principal directions of a layer's inputs, and ranks are shared out by explained variance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from basiscli import DataInit, InputMoments, Parameters, transform

if TYPE_CHECKING:
    from torch import Tensor

    from basiscli.linalg.svd import SVD


class EVAParameters(Parameters):
    """Parameters of `eva`."""

    rho: float = Field(2.0, ge=1, le=1000, description="a module's rank is at most rho times the mean; 1: all equal")
    whiten: bool = Field(False, description="divide each row by the standard deviation along it: A x has variance 1")
    center: bool = Field(True, description="take the mean from the inputs first")


@transform("init", source="Paischer et al., 'One Initialization to Rule them All', arXiv 2410.07170")
class EVA(DataInit):
    """Principal directions of each module's inputs as A, and B = 0.

    The score of a direction is its share of the input's whole variance, σᵢ² / Σ σ², so that scores of different modules
    compare. Every module offers its first round(rho · rank); the best of the whole model are kept, and how many a
    module keeps is its rank.
    """

    Parameters = EVAParameters
    parameters: EVAParameters

    def offered(self, rank: int) -> int:
        """Return how many directions a module offers: round(rho · rank)."""
        return round(self.parameters.rho * rank)

    def directions(self, inputs: InputMoments, count: int, svd: SVD) -> tuple[Tensor, Tensor]:
        """Return the inputs' leading principal directions [count, in] and their explained variance ratios [count]."""
        scatter = inputs.centred if self.parameters.center else inputs.raw
        rows, squares = svd.axes(scatter, count)
        scores = squares / scatter.trace().clamp_min(1e-300)
        if self.parameters.whiten:
            deviation = (squares / inputs.count).sqrt()
            rows = rows / deviation.clamp_min(1e-6 * float(deviation.max()) or 1.0)[:, None]
        return rows, scores
