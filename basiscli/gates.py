"""Gates: conditions over a report's named numbers that make a run fail (`--fail-if 'perplexity_increase > 0.05'`).

Python's parser reads the expression, and nothing but the few kinds of nodes below is ever evaluated: comparisons,
`and`, `or`, `not`, + − * / **, numbers and names. There is no call, no attribute and no index.
"""

from __future__ import annotations

import ast
import keyword
import math
import operator
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from basiscli.errors import GateFailed, UsageError, did_you_mean
from basiscli.names import for_json

_MOST_CHARACTERS, _MOST_NESTED = 1000, 50  # keep recursion far from its limit
_COMPARISONS: dict[type[ast.cmpop], tuple[str, Callable[[float, float], bool]]] = {
    ast.Lt: ("<", operator.lt),
    ast.LtE: ("<=", operator.le),
    ast.Gt: (">", operator.gt),
    ast.GtE: (">=", operator.ge),
    ast.Eq: ("==", operator.eq),
    ast.NotEq: ("!=", operator.ne),
}
_ARITHMETIC: dict[type[ast.operator], Callable[[float, float], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
# `lambda` is a number of ortho's report and a word of Python: such words get a mark for Python's parser.
_MARK = "__word"
_WORDS = re.compile(rf"(?<![\w.])({'|'.join(set(keyword.kwlist) - {'and', 'or', 'not'})})\b")


@dataclass(frozen=True)
class Comparison:
    """One evaluated comparison of a gate."""

    text: str
    """As written: `kl > 0.1`."""
    shown: str
    """With values: `kl = 0.2 > 0.1`."""
    left: float
    right: float
    holds: bool

    def __str__(self) -> str:
        return f"{self.shown} is {str(self.holds).lower()}"


@dataclass(frozen=True)
class Outcome:
    """The result of evaluating a gate."""

    expression: str
    failed: bool
    comparisons: tuple[Comparison, ...]
    cause: str | None = None
    """Why it failed without a comparison: a value that is not a number, a division by zero."""

    def __str__(self) -> str:
        shown = [str(one) for one in self.comparisons]
        return f"gate '{self.expression}': " + "; ".join([*shown, *([self.cause] if self.cause else [])])

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, for `--json`; NaN and Inf as strings."""
        made = [
            {"comparison": one.text, "left": one.left, "right": one.right, "holds": one.holds}
            for one in self.comparisons
        ]
        return {
            "expression": self.expression,
            "failed": self.failed,
            "comparisons": for_json(made),
            "cause": self.cause,
        }


@dataclass(frozen=True)
class Gate:
    """A parsed condition under which a run fails."""

    expression: str
    names: frozenset[str]
    """The numbers that it uses."""
    tree: ast.expr = field(repr=False)

    def check_names(self, known: Collection[str]) -> None:
        """Raise if the condition uses an unknown number.

        Args:
            known: the numbers' names; with `*` for parts that depend on the data: 'task_arc_easy_*'.

        Raises:
            UsageError: with the nearest known name.
        """
        for name in sorted(name for name in self.names if not any(fnmatchcase(name, one) for one in known)):
            raise UsageError(f"--fail-if '{self.expression}': no number '{name}'", remedy=did_you_mean(name, known))

    def outcome(self, numbers: Mapping[str, float]) -> Outcome:
        """Return the result of the condition for these numbers.

        A value that is no number (0/0, a perplexity that overflowed) makes the gate fail: every comparison with it is
        false, and a gate that is meant to stop a broken model would let the most broken one pass.

        Raises:
            UsageError: a name that is not among the numbers.
        """
        self.check_names(numbers)
        made: list[Comparison] = []
        try:
            failed = _truth(self.tree, numbers, made)
        except ArithmeticError as error:
            cause = "a value is out of range" if isinstance(error, OverflowError) else str(error)
            return Outcome(self.expression, True, tuple(made), cause)
        return Outcome(self.expression, failed, tuple(made))


def parse_gate(expression: str) -> Gate:
    """Return a parsed condition.

        parse_gate("perplexity_increase > 0.05").outcome({"perplexity_increase": 0.1}).failed  # True

    Raises:
        UsageError: it is not a comparison, or several joined by `and`, `or` and `not`.
    """
    if len(expression) > _MOST_CHARACTERS:
        raise UsageError(f"--fail-if: {len(expression)} characters", remedy=f"at most {_MOST_CHARACTERS}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the parser's opinions on style, such as `1if`
            tree = ast.parse(_WORDS.sub(rf"\1{_MARK}", expression).strip(), mode="eval").body
        if _depth(tree) > _MOST_NESTED:
            raise ValueError("it is nested too deep")
        names = _check_condition(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        what = error.msg if isinstance(error, SyntaxError) else str(error)
        raise UsageError(
            f"--fail-if '{expression}' is not a condition: {what or 'it is nested too deep'}",
            remedy="compare named numbers: 'perplexity_increase > 0.05', 'kl > 0.1 or agreement < 0.9'",
        ) from error
    return Gate(expression.strip(), frozenset(names), tree)


def check_gates(gates: Sequence[Gate], numbers: Mapping[str, float]) -> list[Outcome]:
    """Return the outcome of every gate; `failure_of` turns failed ones into an error."""
    return [gate.outcome(numbers) for gate in gates]


def failure_of(outcomes: Sequence[Outcome]) -> GateFailed | None:
    """Return the error for gates that failed, None where all passed."""
    failed = [f"failed: {outcome}" for outcome in outcomes if outcome.failed]
    return GateFailed("\n".join(failed)) if failed else None


def _depth(tree: ast.expr) -> int:
    level: list[ast.AST] = [tree]
    depth = 0
    while level:
        level = [child for node in level for child in ast.iter_child_nodes(node)]
        depth += 1
    return depth


def _check_condition(node: ast.expr) -> set[str]:
    """Return the names in a condition; refuse everything that is none."""
    if isinstance(node, ast.BoolOp):
        return set().union(*map(_check_condition, node.values))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return _check_condition(node.operand)
    if isinstance(node, ast.Compare) and all(type(sign) in _COMPARISONS for sign in node.ops):
        return set().union(*map(_check_number, [node.left, *node.comparators]))
    raise ValueError(f"'{_text(node)}' compares nothing")


def _check_number(node: ast.expr) -> set[str]:
    """Return the names in an arithmetic expression; refuse everything that is none."""
    if isinstance(node, ast.Name):
        return {node.id.removesuffix(_MARK)}
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return set()
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        return _check_number(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        return _check_number(node.left) | _check_number(node.right)
    raise ValueError(f"'{_text(node)}' is not a number")


def _truth(node: ast.expr, numbers: Mapping[str, float], made: list[Comparison]) -> bool:
    """Evaluate a condition from left to right, no further than needed, and note the comparisons made."""
    if isinstance(node, ast.BoolOp):
        every = isinstance(node.op, ast.And)
        return (all if every else any)(_truth(value, numbers, made) for value in node.values)
    if isinstance(node, ast.UnaryOp):
        return not _truth(node.operand, numbers, made)
    assert isinstance(node, ast.Compare)
    left = node.left
    for kind, right in zip(node.ops, node.comparators, strict=True):
        sign, compare = _COMPARISONS[type(kind)]
        values = _value(left, numbers), _value(right, numbers)
        for part, value in zip((left, right), values, strict=True):
            if math.isnan(value):
                raise ArithmeticError(f"{_text(part)} is not a number")
        shown = f" {sign} ".join(_shown(part, value) for part, value in zip((left, right), values, strict=True))
        made.append(Comparison(f"{_text(left)} {sign} {_text(right)}", shown, *values, compare(*values)))
        if not made[-1].holds:
            return False
        left = right
    return True


def _value(node: ast.expr, numbers: Mapping[str, float]) -> float:
    if isinstance(node, ast.Name):
        return float(numbers[node.id.removesuffix(_MARK)])
    if isinstance(node, ast.Constant):
        return float(node.value)  # type: ignore[arg-type]  # numbers only, and floats only: 9**9**9 overflows at once
    if isinstance(node, ast.UnaryOp):
        value = _value(node.operand, numbers)
        return -value if isinstance(node.op, ast.USub) else value
    assert isinstance(node, ast.BinOp)
    found = _ARITHMETIC[type(node.op)](_value(node.left, numbers), _value(node.right, numbers))
    if isinstance(found, complex):
        raise ArithmeticError(f"{_text(node)} is the root of a negative number")
    return float(found)


def _shown(node: ast.expr, value: float) -> str:
    return f"{value:.6g}" if isinstance(node, ast.Constant) else f"{_text(node)} = {value:.6g}"


def _text(node: ast.expr) -> str:
    return ast.unparse(node).replace(_MARK, "")
