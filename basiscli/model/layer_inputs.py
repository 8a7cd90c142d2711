"""Recording of the inputs of modules while a model runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class StopForward(BaseException):
    """Raised in a hook to end a forward early; a BaseException, so that no module's `except Exception` catches it."""


@dataclass(frozen=True)
class Inputs:
    """Inputs of the target modules in one forward of a batch."""

    rows: dict[str, Tensor]
    """Inputs of the counted tokens [n, in], by the first of the modules that read the same tensor."""
    readers: dict[str, str]
    """Every module that was called, mapped to its key in `rows`: q, k and v read one tensor."""


class Collector:
    """Collects the inputs of modules in the forward of one batch; forward pre-hooks call `add`."""

    def __init__(self, counted: Tensor | None, awaited: set[str]) -> None:
        """Start without inputs.

        Args:
            counted: which tokens count, bool [windows, tokens]; None for all.
            awaited: modules after whose calls the forward is ended; empty for never.
        """
        self._counted = counted
        self._awaited = awaited
        self.inputs = Inputs({}, {})
        self._last: tuple[Tensor, str] | None = None

    def add(self, name: str, value: Tensor) -> None:
        """Record a module's input [windows, tokens, in] or [rows, in].

        Raises:
            StopForward: it was the last of the awaited modules.
        """
        rows, readers = self.inputs.rows, self.inputs.readers
        if self._last is not None and value is self._last[0] and readers.get(name) in (None, self._last[1]):
            readers[name] = self._last[1]  # the same tensor as its neighbour's: q, k and v
        else:
            first = readers.setdefault(name, name)
            own = self._rows(value)
            rows[first] = torch.cat([rows[first], own]) if first in rows else own
            self._last = value, first
        if self._awaited:
            self._awaited.discard(name)
            if not self._awaited:
                raise StopForward

    def _rows(self, value: Tensor) -> Tensor:
        """Return the rows that count: a copy, whatever the model does to its tensor afterwards."""
        if self._counted is not None and value.dim() == 3 and value.shape[:2] == self._counted.shape:
            return value[self._counted]
        if self._counted is not None and value.dim() == 2 and value.shape[0] == self._counted.numel():
            return value[self._counted.flatten()]
        return value.flatten(0, -2).clone()  # one row a window (a pooler), or tokens that a router chose
