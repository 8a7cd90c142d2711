"""What an init is given and what it returns: functions of a weight, and `DataInit` for directions of its inputs.

An init function takes `weight` (float32 [out, in]), `rank`, and `svd` (how to decompose: `svd.top(weight, rank)`), and
returns (B [out, rank], A [rank, in]): the part of the weight that moves into the adapter. Scaling and residual are the
core's:

    @transform("init", principal=True, source="…")
    def leading(weight, rank, svd):
        \"\"\"The leading singular triples.\"\"\"
        u, s, vt = svd.top(weight, rank)
        return u * s.sqrt(), s.sqrt()[:, None] * vt

`principal=True` allows `--quantize`. With `trains="values"` a function returns (B, σ [rank], A), of which only σ is
trained. With `trains="coefficients"` it takes `random` (the `RandomBases` of A and of B, as many as its parameter
`bases` says) and returns a coefficient for each; ΔW must be 0, as the base stays as it is. One that also asks for
`inputs` (`InputMoments` of what the weight is multiplied with) needs calibration text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

from basiscli.transforms.parameters import Parameters

if TYPE_CHECKING:
    from torch import Tensor

    from basiscli.linalg.svd import SVD


@dataclass(frozen=True)
class InputMoments:
    """First and second moments of a module's inputs x [in] over calibration tokens, about a point c near their mean."""

    count: int
    """Number of tokens."""
    shift: Tensor
    """The point c, float64 [in]."""
    total: Tensor
    """Σ (x − c), float64 [in]."""
    second: Tensor
    """Σ (x − c)(x − c)ᵀ, float64 [in, in]: sums of float32 products."""

    @property
    def centred(self) -> Tensor:
        """Σ (x − x̄)(x − x̄)ᵀ, float64 [in, in]."""
        return self.second.addr(self.total, self.total, alpha=-1 / max(1, self.count))

    @property
    def raw(self) -> Tensor:
        """Σ x xᵀ, float64 [in, in]."""
        mixed = self.total[:, None] * self.shift
        return self.second + mixed + mixed.mT + self.count * self.shift[:, None] * self.shift


class DataInit(ABC):
    """An init whose A spans directions of a module's inputs and whose B is zero, and which shares ranks out.

    The core runs the model, has every module propose directions with scores, and keeps those with the highest scores of
    the whole model: as many in all as equal ranks would have.
    """

    Parameters: ClassVar[type[BaseModel]] = Parameters

    def __init__(self, parameters: Any) -> None:
        self.parameters = parameters

    @abstractmethod
    def offered(self, rank: int) -> int:
        """Return the number of candidate directions that each module proposes for a mean rank of `rank`."""

    @abstractmethod
    def directions(self, inputs: InputMoments, count: int, svd: SVD) -> tuple[Tensor, Tensor]:
        """Return candidate rows of A [count, in] and their scores [count] in falling order; both float64."""
