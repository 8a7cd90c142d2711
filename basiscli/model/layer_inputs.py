"""What modules are called with while a model runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class Enough(BaseException):
    """Ends a forward whose rest is not wanted; no module's `except Exception` may catch it."""


@dataclass(frozen=True)
class Inputs:
    """What targets were called with when a batch passed."""

    rows: dict[str, Tensor]
    """Rows that count [n, in], by the first of the modules that read them."""
    readers: dict[str, str]
    """Every module that was called, and the one by whose name its rows are found."""


class Collector:
    """Keeps what modules are called with as one batch passes."""

    def __init__(self, counted: Tensor | None, awaited: set[str]) -> None:
        self._counted = counted
        """Which tokens count [windows, tokens]; None for all."""
        self._awaited = awaited
        """Modules after whose calls the forward is ended; with none it is not."""
        self.inputs = Inputs({}, {})
        self._last: tuple[Tensor, str] | None = None

    def add(self, name: str, given: Tensor) -> None:
        """Keep what a module is called with."""
        rows, readers = self.inputs.rows, self.inputs.readers
        if self._last is not None and given is self._last[0] and readers.get(name) in (None, self._last[1]):
            readers[name] = self._last[1]  # the same tensor as its neighbour's: q, k and v
        else:
            first = readers.setdefault(name, name)
            own = self._rows(given)
            rows[first] = torch.cat([rows[first], own]) if first in rows else own
            self._last = given, first
        if self._awaited:
            self._awaited.discard(name)
            if not self._awaited:
                raise Enough

    def _rows(self, given: Tensor) -> Tensor:
        """Return the rows that count: a copy, whatever the model does to its tensor afterwards."""
        if self._counted is not None and given.dim() == 3 and given.shape[:2] == self._counted.shape:
            return given[self._counted]
        if self._counted is not None and given.dim() == 2 and given.shape[0] == self._counted.numel():
            return given[self._counted.flatten()]
        return given.flatten(0, -2).clone()  # one row a window (a pooler), or tokens that a router chose
