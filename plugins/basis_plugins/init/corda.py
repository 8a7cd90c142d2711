"""CorDA: the weight is decomposed as its inputs see it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from basiscli import InputMoments, transform

if TYPE_CHECKING:
    from torch import Tensor

    from basiscli.linalg.svd import SVD


@transform("init", source="Yang et al., 'CorDA', arXiv 2406.05223")
def corda(
    weight: Tensor,
    rank: int,
    svd: SVD,
    inputs: InputMoments,
    *,
    mode: Annotated[
        Literal["instruction", "knowledge"],
        Field(
            description="adapt what the calibration text uses most (the largest), or what it does not (the smallest)"
        ),
    ] = "instruction",
    damping: Annotated[
        float, Field(gt=0, le=1, description="share of the inputs' mean square added to each direction")
    ] = 0.01,
) -> tuple[Tensor, Tensor]:
    """SVD of W C = U Σ Vᵀ with C the inputs' covariance: B = U √Σ, A = √Σ Vᵀ C⁻¹.

    The instruction mode (IPM in the paper) takes the largest singular values: calibrate on the task. The knowledge mode
    (KPM) takes the smallest: calibrate on what the model shall not forget.
    """
    import torch

    covariance = inputs.raw / inputs.count
    mean = covariance.diagonal().mean()
    # In units of the mean square input, so that B and A are of like size whatever the scale of the activations.
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    covariance = covariance / mean.clamp_min(1e-300) + damping * identity
    oriented = weight.double() @ covariance
    u, s, vh = svd.top(oriented, rank) if mode == "instruction" else svd.bottom(oriented, rank)
    root = s.sqrt()
    return (u * root).float(), torch.linalg.solve(covariance, (root[:, None] * vh).mT).mT.float()
