"""Factors from weights: PiSSA, MiLoRA, OLoRA, SVFit, `extract` at one rank; and CorDA, which looks at inputs, too."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from torch import Tensor

from basiscli.commands.init.formats import FactorFormat
from basiscli.commands.init.input_moments import calibration_windows, do_locally, moments_by_layer
from basiscli.commands.init.residual import Residual, residual_of
from basiscli.commands.init.run import Entry, InitRun, norm_and_energy, shown
from basiscli.engine.tasks import Task
from basiscli.errors import BasisError, InputError
from basiscli.linalg.finite import is_finite
from basiscli.model.stored_moments import StoredMoments
from basiscli.transforms import InputMoments


@dataclass
class WeightsRun(InitRun):
    """Every target becomes factors of one rank, and what they leave of it; other tensors are copied."""

    residual: Residual = field(init=False)

    def __post_init__(self) -> None:
        self.residual = residual_of(self.plan, self.output)

    def write_weights(self) -> None:
        """Decompose weights and copy the rest in one pass."""
        self.ranks = self.plan.equal_ranks
        self.forget_unwritten()
        self.do(self.tasks([*self.plan.targets, *self.plan.copied]), self.decompose_or_copy)

    def batch_key(self, name: str) -> Hashable:
        """Return the shape, whichever way it lies: the smaller Gram matrix is decomposed."""
        return tuple(sorted(self.plan.linear_shape(name)))

    @property
    def format(self) -> FactorFormat:
        """How the factors are stored."""
        assert isinstance(self.plan.format, FactorFormat)
        return self.plan.format

    # Tasks ------------------------------------------------------------------------------------------------------------

    def decompose_or_copy(self, name: str) -> Entry:
        """Do what is planned for one tensor of the model; return its entry in the journal."""
        return self.decompose(name) if name in self.plan.targets else self.copy(name)

    def decompose(self, name: str, stored_inputs: StoredMoments | None = None) -> Entry:
        """Write the factors of one weight and the weight without them; return its entry in the journal."""
        rank, scaling = self.plan.rank, self.plan.scaling(self.plan.rank)
        inputs = stored_inputs.load(self.device) if stored_inputs else None
        weight, read = self.read_weight(name)
        factors = self.residual.factors(weight, lambda matrix: self._factors(name, matrix, inputs))
        tensors = self.rounded(name, rank, self.format.stored(factors, scaling))
        low_rank = self.format.update([*tensors.values()])
        update = scaling * (low_rank.b @ low_rank.a)
        rest = weight - update
        entry = norm_and_energy(weight, rest) | {"inputs": read, "rank": rank}
        digests = self.write_adapter(tensors)
        spectrum = shown(low_rank.svd()[1] * scaling)
        of_residual, errors = self.residual.write(name, weight, update, rest)
        return entry | {"digests": digests | of_residual, "spectrum": spectrum, **errors}

    def _factors(self, name: str, matrix: Tensor, inputs: InputMoments | None) -> tuple[Tensor, ...]:
        """Return what the method makes of a matrix [out, in], checked: (B, A), or (B, σ, A) where it trains values."""
        plan = self.plan
        available = {"weight": matrix, "rank": plan.rank, "svd": self.svd(name), "inputs": inputs}
        factors = tuple(plan.method.call(plan.values, available))
        fit = [factor.shape for factor in factors] == self.format.shapes(matrix.shape, plan.rank)
        if not (fit and all(is_finite(factor) for factor in factors)):
            found = " and ".join(str(list(factor.shape)) for factor in factors)
            what = f"factors of {found}" if not fit else "factors with NaN or Inf"
            raise BasisError(
                f"{plan.method.name} made {what}",
                tensor=name,
                remedy=f"an init method returns {self.format.returns}; report this to its author",
            )
        return factors


class WeightsAndInputsRun(WeightsRun):
    """The same for a method that also wants a weight's inputs: each is decomposed while their moments are there."""

    def write_weights(self) -> None:
        """Run the calibration text through the model, decompose a layer's weights after it, and copy the rest."""
        self.ranks = self.plan.equal_ranks
        self.forget_unwritten()
        self.windows = calibration_windows(self.plan)  # the report tells of it even where nothing is left to do
        if not self.output.finished.keys() >= self.plan.targets.keys():
            self._decompose_by_layer()
        self.do(self.tasks(self.plan.copied), self.copy)

    def batch_key(self, name: str) -> Hashable:
        """Return the number of inputs: their moments are decomposed."""
        return self.plan.linear_shape(name)[1]

    def _decompose_by_layer(self) -> None:
        reached: set[str] = set()
        for moments in moments_by_layer(self):
            found = [name for name, module in self.plan.targets.items() if module in moments]
            reached |= {*found}
            # What the inputs cost has been counted: the tasks are of no size.
            tasks = self.unfinished(
                Task(name, 0, self.plan.workspace(name), (name, moments[self.plan.targets[name]])) for name in found
            )
            do_locally(self, tasks, self.decompose, self.output.record)
        for name in self.plan.targets:
            if name not in reached:
                raise InputError(
                    "no calibration token reaches this layer",
                    tensor=name,
                    remedy="leave it out with --target-modules",
                )
