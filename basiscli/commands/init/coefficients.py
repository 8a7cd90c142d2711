"""The start of a NOLA adapter: coefficients of random matrices that a seed gives; no weight is read."""

from __future__ import annotations

from basiscli.commands.init.formats import NOLAFormat
from basiscli.commands.init.run import Entry, InitRun
from basiscli.linalg.nola import factor_bases


class CoefficientsRun(InitRun):
    """Coefficients for every target, such that ΔW = 0: the base stays as it is."""

    def write_weights(self) -> None:
        """Write the adapter."""
        self.ranks = self.plan.equal_ranks
        self.forget_unwritten()
        self.do(self.tasks(self.plan.targets), self.start)

    def start(self, name: str) -> Entry:
        """Write the coefficients a and b that one module's training begins with; return its entry in the journal."""
        plan, module = self.plan, self.plan.modules[name]
        assert isinstance(plan.format, NOLAFormat)
        random = factor_bases(
            plan.settings.seed, module.name, rank=plan.rank, count=plan.format.bases,
            in_features=module.in_features, out_features=module.out_features,
        )  # fmt: skip
        coefficients = [*plan.method.call(plan.values, {"random": random})]
        return {
            "rank": plan.rank,
            "energy": 0.0,
            "digests": self.write_adapter(self.rounded(name, plan.rank, coefficients)),
        }
