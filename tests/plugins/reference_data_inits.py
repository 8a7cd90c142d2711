"""EVA and CorDA as their formulas say them: whole decompositions of all inputs, in float64."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Principal:
    """Right singular vectors of inputs, the share of the whole that each explains, and deviations along them."""

    def __init__(self, rows: Tensor, *, center: bool = True) -> None:
        moved = rows - rows.mean(0) if center else rows
        _, s, self.vectors = torch.linalg.svd(moved, full_matrices=False)
        self.squares = s.square()
        self.ratios = (self.squares / self.squares.sum()).tolist()
        self.deviations = (self.squares / len(rows)).sqrt()

    def gap(self, place: int) -> float:
        """Return how far an eigenvalue is from the next, relative to the largest: it decides how sharp a vector is."""
        apart = (self.squares - self.squares[place]).abs()
        apart[place] = torch.inf
        return float(apart.min() / self.squares[0])


def shared_out(ratios: Mapping[str, list[float]], rank: int, rho: float) -> dict[str, int]:
    """Return what every module gets of rank · modules places: the highest ratios; of equal ones the earlier module's.

    Modules come in the order of their names.
    """
    offers = [(ratio, module) for module in sorted(ratios) for ratio in ratios[module][: round(rho * rank)]]
    offers.sort(key=lambda offer: -offer[0])
    best = [module for _, module in offers[: rank * len(ratios)]]
    return {module: best.count(module) for module in ratios}


def check_rows(a: Tensor, principal: Principal, tolerance: float = 1e-5) -> None:
    """Check that rows are the leading singular vectors up to sign, as sharply as their values are apart."""
    for place, row in enumerate(a.double()):
        vector = principal.vectors[place]
        away = min(float((row - vector).norm()), float((row + vector).norm()))
        assert away <= tolerance * max(1.0, 0.1 / principal.gap(place)), place


def oriented(weight: Tensor, rows: Tensor, rank: int, mode: str, damping: float) -> tuple[Tensor, Tensor]:
    """Return B and A in float64, with a full SVD and an inverse."""
    covariance = rows.mT @ rows / len(rows)
    covariance = covariance / covariance.diagonal().mean()
    covariance = covariance + damping * torch.eye(len(covariance), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(weight @ covariance, full_matrices=False)
    some = slice(0, rank) if mode == "instruction" else slice(len(s) - rank, len(s))
    return u[:, some] * s[some].sqrt(), s[some].sqrt()[:, None] * vh[some] @ torch.linalg.inv(covariance)
