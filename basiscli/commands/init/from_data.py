"""Adapters from data: A from directions of a module's inputs, B = 0, and ranks that are shared out by score (EVA)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

from basiscli.commands.init.formats import LoRAFormat
from basiscli.commands.init.input_moments import calibration_windows, do_locally, moments_by_layer
from basiscli.commands.init.run import Entry, InitRun, shown
from basiscli.engine.batches import in_batches
from basiscli.engine.tasks import Task
from basiscli.errors import BasisError, InputError
from basiscli.linalg.finite import is_finite
from basiscli.model.stored_moments import StoredMoments
from basiscli.transforms import DataInit

Offer = tuple[Tensor, Tensor]
"""Rows for A [count, in], float32, and their scores [count] in falling order, both on the CPU."""


class DataRun(InitRun):
    """Directions of all targets' inputs are collected first; then ranks are shared out, and A and B = 0 written."""

    def write_weights(self) -> None:
        """Write the adapter; the base stays as it is."""
        plan = self.plan
        offers = self._offers()
        scores = {name: offers[name][1] if name in offers else torch.zeros(0) for name in plan.targets}
        self.ranks = shared_ranks(scores, plan.rank)
        self.output.allocate(plan.layout_of(self.ranks))
        for name, rank in self.ranks.items():
            self.output.record(name, self._written(name, rank, offers.get(name)))
        unreached = [name for name in plan.targets if name not in offers]
        if unreached:
            plan.notes.append(f"{len(unreached)} modules get no input and no factors, such as {unreached[0]}")

    def batch_key(self, name: str) -> Hashable:
        """Return the number of inputs: their moments are decomposed."""
        return self.plan.linear_shape(name)[1]

    def _offers(self) -> dict[str, Offer]:
        """Return the directions of every target that gets inputs, by weight."""
        self.windows = calibration_windows(self.plan)
        offers: dict[str, Offer] = {}
        for moments in moments_by_layer(self):
            readers: dict[StoredMoments, list[str]] = {inputs: [] for inputs in moments.values()}
            for name, module in self.plan.targets.items():
                if module in moments:
                    readers[moments[module]].append(name)
            for inputs, names in readers.items():
                self._refuse_few_tokens(names[0], inputs.count)
            tasks = [
                Task(names[0], 0, self.plan.workspace(names[0]), (names[0], inputs))
                for inputs, names in readers.items()
            ]
            made: dict[str, Entry] = {}
            batches = in_batches(tasks, self._batch_key, device=self.device, done=())  # no journal has directions
            do_locally(self, batches, self.directions, made.__setitem__)
            for names in readers.values():
                offers |= dict.fromkeys(names, (made[names[0]]["rows"], made[names[0]]["scores"]))
        return offers

    def directions(self, name: str, stored: StoredMoments) -> dict[str, Tensor]:
        """Return what the method offers for a weight and all that read the same: `rows` of A, and their `scores`.

        Raises:
            BasisError: they have other shapes than they should have, or NaN.
        """
        plan, inputs, count = self.plan, stored.load(self.device), self._offered(name)
        rows, scores = self._method.directions(inputs, count, self.svd(name))
        if (
            rows.shape != (count, plan.linear_shape(name)[1])
            or len(scores) != count
            or not (is_finite(rows) and is_finite(scores))
        ):
            raise BasisError(
                f"{plan.method.name} made directions of {list(rows.shape)} with {len(scores)} scores, or NaN",
                tensor=name,
                remedy="`directions` returns A [count, in] and scores [count]; report this to the method's author",
            )
        return {"rows": rows.cpu().float(), "scores": scores.cpu()}  # they wait until the ranks are known

    def _written(self, name: str, rank: int, offer: Offer | None) -> Entry:
        """Write A and B = 0 of a weight; return its entry in the journal."""
        if offer is None or not rank:
            return {"rank": rank, "energy": 0.0, "digests": {}}
        rows, scores = offer
        b = torch.zeros(self.plan.linear_shape(name)[0], rank)
        # B is zero, and so is the update: A keeps its size whatever the scaling.
        tensors = self.rounded(name, rank, LoRAFormat().stored((b, rows[:rank]), scaling=1.0))
        return {
            "rank": rank,
            "energy": float(scores[:rank].sum()),
            "digests": self.write_adapter(tensors),
            "spectrum": shown(scores[:rank]),
        }

    @property
    def _method(self) -> DataInit:
        method: DataInit = self.plan.method.implementation(self.plan.values)
        return method

    def _offered(self, name: str) -> int:
        """Return how many directions a weight's inputs are to offer."""
        return min(self._method.offered(self.plan.rank), self.plan.linear_shape(name)[1])

    def _refuse_few_tokens(self, name: str, count: int) -> None:
        if count <= self._offered(name):
            raise InputError(
                f"{count} calibration tokens reach this layer, too few for {self._offered(name)} directions",
                file=self.plan.calibration.place if self.plan.calibration else None,
                tensor=name,
                remedy="give more text with --calibration, more --tokens, or a smaller --rank",
            )


def shared_ranks(scores: Mapping[str, Tensor], rank: int) -> dict[str, int]:
    """Return how many of its scores each name has among the best rank · names of all.

    Equal scores go to the earlier name: modules that read the same input come out with equal ranks, up to one.
    """
    budget = rank * len(scores)
    order = [(-float(score), index, name) for name, own in scores.items() for index, score in enumerate(own.tolist())]
    order.sort(key=lambda entry: entry[:2])  # stable: names in their order
    ranks = dict.fromkeys(scores, 0)
    for _, _, name in order[:budget]:
        ranks[name] += 1
    return ranks
