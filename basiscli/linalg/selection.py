"""Exact order statistics of tensors that come in blocks, without sorting them or keeping them in memory.

Floats that are not negative are ordered as their bits are, read as integers. One pass over the blocks counts the
leading 16 bits of every element; the count tells which of the 65,536 classes holds the k-th largest, and the next pass
looks at the next 16 bits of that class alone: two passes for float32, four for float64 (radix selection, as in Knuth,
'The Art of Computer Programming' 3, 5.2.5). Memory is the counts', whatever the tensor's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

DIGIT = 16  # bits a pass

Pass = Callable[[], Iterable[tuple[int, list[Tensor]]]]
"""Returns an iterator over blocks of tensors of one shape: (flat index of the first element, one block a tensor)."""


@dataclass(frozen=True)
class Cut:
    """The threshold of the k elements of largest magnitude of a tensor.

    They are those above `value` and, of the ones equal to it, those before the flat index `end` (None: all of them):
    exactly k, however many are equal. Which of the equal ones count is the same for any size of blocks.
    """

    value: float
    end: int | None = None

    def keep(self, values: Tensor, start: int) -> Tensor:
        """Return a block with all elements but the k largest of the tensor set to zero, in a new tensor.

        Args:
            values: the block, any shape and sign.
            start: index of its first element in the flat tensor.
        """
        # hardshrink keeps what is strictly beyond its bound; a bound just below the value keeps the value too.
        below = torch.tensor(self.value, dtype=values.dtype).nextafter(torch.tensor(-1.0, dtype=values.dtype)).item()
        if self.value <= 0:
            return values.clone()  # fewer than k elements are not zero
        if self.end is None or start + values.numel() <= self.end:
            return hardshrink(values, below)
        kept = hardshrink(values, self.value)
        equal = self.end - start
        if equal > 0:
            kept.view(-1)[:equal] = hardshrink(values.reshape(-1)[:equal], below)
        return kept


NOTHING = Cut(float("inf"))
"""The threshold of no elements, k = 0."""


def largest(over: Pass, counts: Sequence[Sequence[int]]) -> list[list[Cut]]:
    """Return the thresholds of the k largest elements of several tensors, in the form of `counts`.

        ((cut,),) = largest(lambda: [(0, [tensor.abs()])], [[100]])
        cut.keep(tensor, 0)  # its 100 largest elements in magnitude, else 0

    Args:
        over: returns the blocks; values must not be negative. Called two to five times, once a pass.
        counts: for each tensor one k or more, between 0 and its number of elements.
    """
    queries = [[_Query(k) for k in ks] for ks in counts]
    open_queries = [[query for query in own if query.wanted > 0] for own in queries]
    if any(open_queries):
        _find_values(over, open_queries)
    if any(query.splits_equal for own in open_queries for query in own):
        _find_ends(over, open_queries)
    return [[query.cut() for query in own] for own in queries]


class _Query:
    """One k on its way to its border."""

    def __init__(self, k: int) -> None:
        self.wanted = k
        """How many to take from the class of elements that share the prefix, the largest first."""
        self.prefix = 0
        """The leading bits of the k-th largest, as far as they are known."""
        self.equal = 0
        """How many elements the class has."""
        self.dtype = torch.float32
        self.end: int | None = None

    def refine(self, histogram: Tensor) -> None:
        """Take one more digit, given how many elements of the class have each."""
        at_least = histogram.flip(0).cumsum(0)  # of the largest digit, the two largest, …
        place = int(torch.searchsorted(at_least, self.wanted))
        digit = len(histogram) - 1 - place
        self.equal = int(histogram[digit])
        self.wanted -= int(at_least[place]) - self.equal
        self.prefix = self.prefix << DIGIT | digit

    @property
    def splits_equal(self) -> bool:
        """Whether only some of several equal elements are wanted; where they are zero it makes no difference."""
        return 0 < self.wanted < self.equal and self.prefix > 0 and self.end is None

    def cut(self) -> Cut:
        if self.equal == 0:
            return NOTHING
        bits = torch.tensor(self.prefix, dtype=_integer(self.dtype))
        return Cut(bits.view(self.dtype).item(), self.end)


def _integer(dtype: torch.dtype) -> torch.dtype:
    return torch.int64 if dtype == torch.float64 else torch.int32


def _bits(values: Tensor) -> Tensor:
    return values.reshape(-1).view(_integer(values.dtype))


def _find_values(over: Pass, queries: list[list[_Query]]) -> None:
    """Narrow every query down to the value of its k-th largest, a digit a pass."""
    shift: int | None = None
    while shift is None or shift > 0:
        histograms: dict[tuple[int, int], Tensor] = {}
        below = shift  # the bits that are not yet known of any query
        for _, tensors in over():
            for number, values in enumerate(tensors):
                bits = _bits(values)
                below = torch.iinfo(bits.dtype).bits if shift is None else shift
                leading = bits >> (below - DIGIT)
                for prefix in {query.prefix for query in queries[number]}:
                    digits = leading if shift is None else leading[(leading >> DIGIT) == prefix] & (1 << DIGIT) - 1
                    counted = torch.bincount(digits, minlength=1 << DIGIT)
                    total = histograms.get((number, prefix))
                    histograms[number, prefix] = counted if total is None else total.add_(counted)
                for query in queries[number]:
                    query.dtype = values.dtype
        assert below is not None  # a query with elements to take has blocks to take them from
        on_cpu = {key: histogram.cpu() for key, histogram in histograms.items()}
        for number, own in enumerate(queries):
            for query in own:
                query.refine(on_cpu[number, query.prefix])
        shift = below - DIGIT


def _find_ends(over: Pass, queries: list[list[_Query]]) -> None:
    """Find where the last wanted one of several equal elements lies."""
    seen = {id(query): 0 for own in queries for query in own if query.splits_equal}
    for start, tensors in over():
        for values, own in zip(tensors, queries, strict=True):
            for query in own:
                if id(query) not in seen or query.end is not None:
                    continue
                equal = _bits(values) == query.prefix
                count, missing = int(equal.sum()), query.wanted - seen[id(query)]
                if count >= missing:
                    query.end = start + int(equal.nonzero()[missing - 1]) + 1
                seen[id(query)] += count
