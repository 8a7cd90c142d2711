"""MatryoshkaKV: trained orthogonal projections of keys and values that can be truncated at any rank."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from basiscli import AttentionMoments, KVCompression, Parameters, transform

if TYPE_CHECKING:
    from torch import Generator, Tensor


class MatryoshkaParameters(Parameters):
    """Parameters of `matryoshka`."""

    start: Literal["pca", "attention"] = Field(
        "attention",
        description="axes before training: of the keys and values themselves (pca, as published), or those that "
        "change the scores q·k and the layer's output least (attention)",
    )
    kl_weight: float = Field(0.25, ge=0, le=1, description="share of the KL divergence in the loss")
    learning_rate: float = Field(2e-3, gt=0, le=1, description="of AdamW, reached after warm-up, then falling to 0")
    warmup: int = Field(100, ge=0, description="steps of warm-up, at most a tenth of all")


@transform("compress", source="Lin et al., MatryoshkaKV, arXiv 2410.14731")
class Matryoshka(KVCompression):
    """Trained orthogonal projections of the KV cache.

    Every step of the training cuts each basis at a rank drawn at random, so that the columns put themselves in order of
    importance and one training serves every ratio. The bases start at principal axes and turn by the Cayley map, which
    keeps them orthogonal: U = U₀ (I − A/2)⁻¹ (I + A/2), A skew-symmetric. The loss is
    kl_weight · KL(dense ‖ compressed) + (1 − kl_weight) · cross-entropy of the next token.
    """

    Parameters = MatryoshkaParameters
    parameters: MatryoshkaParameters

    def start(self, moments: AttentionMoments) -> Tensor:
        """Return initial bases, float32 [layers, 2, KV heads, d, d]: principal axes, or those for `attention`."""
        import torch

        from basiscli.linalg.orthogonal import least_product_error, principal_axes

        found = []
        for own, other in ((moments.keys, moments.queries), (moments.values, moments.outputs)):
            axes = principal_axes(own)[0]
            found.append(least_product_error(own, other, axes) if self.parameters.start == "attention" else axes)
        return torch.stack(found, 1).float()

    def turned(self, start: Tensor, free: Tensor) -> Tensor:
        """Return the bases U₀ (I − A/2)⁻¹ (I + A/2) for A = free − freeᵀ, all [layers, 2, KV heads, d, d]."""
        from basiscli.linalg.orthogonal import cayley

        return start @ cayley(free)

    def draw(self, shape: tuple[int, ...], levels: int, generator: Generator) -> Tensor:
        """Return an independent uniform rank in 1 … levels for every basis, int64 of `shape`."""
        import torch

        return torch.randint(1, levels + 1, shape, generator=generator)

    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """Return the weighted KL divergence and cross-entropy, mean over tokens, of logits [tokens, vocabulary]."""
        share = self.parameters.kl_weight
        log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        return share * divergence - (1 - share) * log_q.gather(-1, labels[:, None]).mean()

    def learning_rate(self, step: int, steps: int) -> float:
        """Return the learning rate of a step: linear warm-up, then half a cosine down to 0."""
        warmup = min(self.parameters.warmup, steps // 10)
        if step < warmup:
            return self.parameters.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, steps - warmup)
        return self.parameters.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
