"""Sequential orthogonal merging."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from basiscli import Kind, Norms, Parameters, TaskVectorMerge, TaskVectors, transform

if TYPE_CHECKING:
    from torch import Tensor

    from basiscli.linalg.lowrank import LowRank


class OrthoParameters(Parameters):
    """Parameters of `ortho`."""

    alpha: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of the merged model's sum of singular values whose directions are closed to the next model",
    )


@transform("merge", source="Tang et al., 'Merging Models on the Fly Without Retraining' (OPCM), arXiv 2501.09522")
class Ortho(TaskVectorMerge):
    """Sequential orthogonal merging: each model adds what the models before it leave free.

    For every linear weight the next task vector is cleared of what lies in the leading singular directions of the
    merged one, and of its diagonal in the others, and then added; every other parameter is added as it is. In the
    end the merged task vector gets the mean length of the single ones, so that nothing has to be tuned. The order of
    the models matters. `--onto` continues exactly.

    The paper rescales after each model. Its projection does not depend on the scale of S, so the factors telescope into
    one at the end: `W = W_base + (mean ‖Tᵢ‖ / ‖S‖) · S`.
    """

    Parameters = OrthoParameters

    def merge(self, task_vectors: TaskVectors) -> tuple[Tensor | LowRank | None, dict[str, Any]]:
        """Return S and, for each model after the first, the number r of leading directions that were closed to it."""
        from basiscli.linalg.projection import project_and_add, rounding_noise  # here, since they import torch

        merged: Any = None
        closed: list[int] = []
        noise = 0.0
        if task_vectors.kind is Kind.LINEAR and task_vectors.weight_norm:
            rows, columns = task_vectors.shape
            noise = rounding_noise(task_vectors.weight_norm, (rows, columns))
        for task_vector in task_vectors:
            if merged is None:
                merged = task_vector
            elif task_vectors.kind is Kind.LINEAR:
                merged, r = project_and_add(merged, task_vector, self.parameters.alpha, noise)
                closed.append(r)
            else:
                merged = merged + task_vector
        return merged, {"r": closed} if closed else {}

    def elementwise(self, kind: Kind) -> bool:
        """Return True for all but linear weights, which are decomposed."""
        return kind is not Kind.LINEAR

    def scale(self, norms: Norms) -> dict[str, float]:
        """Return the scale that makes the merged task vector as long as the average one (the paper's 1/λ)."""
        total, count = sum(norms.task_vectors), len(norms.task_vectors)
        if norms.history is not None:
            total += norms.history.numbers["mean_norm"] * norms.history.numbers["models"]
            count += int(norms.history.numbers["models"])
        mean = total / count
        scale = mean / norms.merged if norms.merged > 0 else 1.0
        return {
            "scale": scale,
            "lambda": 1 / scale if scale > 0 else 1.0,
            "mean_norm": mean,
            "models": float(count),
        }
