"""`--fail-if`: what a condition may be, what it comes to, and what a failed gate does to a command."""

from __future__ import annotations

import ast
import json
import math
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st

from basiscli import GateFailed, UsageError
from basiscli.cli.gates_and_push import known_numbers
from basiscli.errors import BasisError
from basiscli.gates import check_gates, failure_of, parse_gate
from basiscli.registry import Registry
from tests.conftest import snapshot

Basis = Callable[..., Result]
NUMBERS = {"kl": 0.25, "lambda": 2.5, "zero": 0.0, "nan": math.nan, "inf": math.inf, "minus": -8.0}


def fails(expression: str) -> bool:
    return parse_gate(expression).outcome(NUMBERS).failed


@pytest.mark.parametrize(
    "expression, expected",
    [
        ("kl > 0.2", True),
        ("kl > 0.25", False),
        ("kl >= 0.25", True),
        ("kl == 1 / 4", True),
        ("kl != 0.25", False),
        ("lambda > 2", True),  # a word of Python
        ("lambda*2 - 1 < 3 or kl<=.25", True),
        ("kl > 1 or lambda > 1 and kl > 1", False),
        ("(kl > 1 or lambda > 1) and not kl > 1", True),
        ("0 < kl < 1", True),
        ("1 < lambda < 2", False),
        ("-kl < -0.2", True),
        ("2 ** -2 == kl", True),
        ("-2 ** 2 == -4", True),
        ("inf > 1e308", True),
        ("1_000 > kl", True),
        ("zero != 0 and kl / zero > 1", False),  # no further than needed
        ("\tkl\t>0  ", True),
    ],
)
def test_conditions(expression: str, expected: bool) -> None:
    assert fails(expression) is expected


@pytest.mark.parametrize(
    "expression, cause",
    [
        ("nan > 1", "nan is not a number"),
        ("nan < 1", "nan is not a number"),
        ("not nan > 1", "nan is not a number"),
        ("inf - inf > 1", "inf - inf is not a number"),
        ("kl / zero > 1", "division by zero"),
        ("zero ** -1 > 1", "0.0 cannot be raised to a negative power"),
        ("minus ** 0.5 > 1", "minus ** 0.5 is the root of a negative number"),
        ("9 ** 9 ** 9 > 1", "a value is out of range"),
        (f"{'9' * 400} > 1", "a value is out of range"),
    ],
)
def test_what_is_no_number_fails(expression: str, cause: str) -> None:
    outcome = parse_gate(expression).outcome(NUMBERS)
    assert outcome.failed
    assert outcome.cause is not None
    assert cause in outcome.cause
    assert cause in str(failure_of([outcome]))


@pytest.mark.parametrize(
    "expression",
    [
        "", " ", "kl", "1", "kl > ", "kl = 1", "kl := 1", "kl > 1; kl > 2", "kl > 1, kl > 2", "not kl", "kl or kl > 1",
        "(kl > 1) + 1 > 1", "(kl > 1) > 0", "kl % 2 > 1", "kl // 2 > 1", "kl @ kl > 1", "kl & 1 > 0", "~kl > 1",
        "kl in kl", "kl is kl", "kl > 'a'", "kl > None()", "kl > 1j", "kl > b'1'", "kl > ...", "kl[0] > 1",
        "kl.real > 1", "abs(kl) > 1", "__import__('os').system('touch x') > 1", "[kl] > [1]", "(kl, 1) > (1, 1)",
        "f'{kl}' > 1", "kl > 1 if kl > 1 else kl > 2", "lambda: 1", "(lambda x: x)(1) > 0", "[x for x in 1] > 1",
        "await kl > 1", "yield kl", "*kl > 1", "kl > 1 #\n\n(", "(" * 90 + "kl > 1", "-" * 300 + "kl > 1",
        "not " * 200 + "kl > 1", "kl > 1 and " * 10 + "(" * 60 + "kl", "kl\0 > 1", "\ud800 > 1", "k" * 2000 + " > 1",
    ],
)  # fmt: skip
def test_what_is_no_condition(expression: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_gate(expression)
    assert caught.value.remedy


@given(st.text(alphabet=st.sampled_from("kl ambd01.<>=!+-*/()and orte[]'\"\\\n:,\0é\ud800"), max_size=60) | st.text())
def test_any_text_is_a_condition_or_bad_usage(text: str) -> None:
    try:
        parse_gate(text).outcome(NUMBERS)
    except BasisError as error:
        assert error.exit_code == 2


OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
COMPARISONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq}


@st.composite
def arithmetic(draw: st.DrawFn, depth: int = 3) -> tuple[str, float]:
    """Return the words of a sum or product and its value, worked out as it is put together."""
    if depth == 0 or draw(st.booleans()):
        name = draw(st.sampled_from(["kl", "lambda", "zero", "minus", "3", "0.5"]))
        return name, NUMBERS[name] if name in NUMBERS else float(name)
    sign = draw(st.sampled_from(sorted(OPERATIONS)))
    (left, a), (right, b) = draw(arithmetic(depth - 1)), draw(arithmetic(depth - 1))
    return f"({left} {sign} {right})", OPERATIONS[sign](a, b)


@st.composite
def conditions(draw: st.DrawFn, depth: int = 2) -> tuple[str, bool]:
    kind = draw(st.sampled_from(["and", "or", "not", "compare"] if depth else ["compare"]))
    if kind == "compare":
        sign = draw(st.sampled_from(sorted(COMPARISONS)))
        (left, a), (right, b) = draw(arithmetic()), draw(arithmetic())
        return f"{left} {sign} {right}", COMPARISONS[sign](a, b)
    left, a = draw(conditions(depth - 1))
    if kind == "not":
        return f"not ({left})", not a
    right, b = draw(conditions(depth - 1))
    return f"({left}) {kind} ({right})", (a and b) if kind == "and" else (a or b)


@given(conditions())
def test_a_condition_comes_to_what_its_parts_come_to(made: tuple[str, bool]) -> None:
    expression, expected = made
    assert fails(expression) is expected


def test_the_same_as_python_says() -> None:
    for expression in (
        "kl + 1 * 2 ** 3 / 4 - -1 > 3.24",
        "1 - 2 - 3 < kl",
        "2 ** 3 ** 0 == 2",
        "not kl > 1 and kl < 1",
    ):
        assert isinstance(ast.parse(expression, mode="eval"), ast.Expression)
        assert fails(expression) is eval(expression, {"kl": 0.25})


def test_a_name_that_no_number_has() -> None:
    with pytest.raises(UsageError) as caught:
        parse_gate("lamda > 1").outcome(NUMBERS)
    assert caught.value.what == "--fail-if 'lamda > 1': no number 'lamda'"
    assert "did you mean 'lambda'?" in (caught.value.remedy or "")


def test_the_failure_shows_both_values() -> None:
    gates = [parse_gate(text) for text in ("kl > 0.1 and lambda < 3", "kl > 1", "lambda - 1 > kl")]
    outcomes = check_gates(gates, NUMBERS)
    failure = failure_of(outcomes)
    assert isinstance(failure, GateFailed)
    assert failure.exit_code == 4
    assert failure.what.splitlines() == [
        "failed: gate 'kl > 0.1 and lambda < 3': kl = 0.25 > 0.1 is true; lambda = 2.5 < 3 is true",
        "failed: gate 'lambda - 1 > kl': lambda - 1 = 1.5 > kl = 0.25 is true",
    ]
    assert outcomes[1].as_dict() == {
        "expression": "kl > 1",
        "failed": False,
        "comparisons": [{"comparison": "kl > 1", "left": 0.25, "right": 1.0, "holds": False}],
        "cause": None,
    }
    assert failure_of(outcomes[1:2]) is None


def test_infinity_is_a_word_in_json() -> None:
    (outcome,) = check_gates([parse_gate("inf > 1")], NUMBERS)
    assert json.loads(json.dumps(outcome.as_dict(), allow_nan=False))["comparisons"][0]["left"] == "inf"


# Commands -------------------------------------------------------------------------------------------------------------


def merged(basis: Basis, family: dict[str, Path], *words: str | Path) -> Result:
    return basis("merge", family["a"], family["b"], "--base", family["base"], "-m", "ortho", *words)


def test_a_gate_that_passes(basis: Basis, family: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = merged(basis, family, "-o", out, "--fail-if", "lambda < 0", "--fail-if", "models != 2")
    assert result.exit_code == 0
    assert result.stdout == f"{out}\n"
    assert "passed: gate 'models != 2': models = 2 != 2 is false" in result.stderr


def test_a_gate_that_fails_leaves_the_output(basis: Basis, family: dict[str, Path], tmp_path: Path) -> None:
    out, before = tmp_path / "out", snapshot(*family.values())
    result = merged(basis, family, "-o", out, "--fail-if", "models > 1")
    assert result.exit_code == 4
    assert result.stdout == f"{out}\n"
    assert "error: failed: gate 'models > 1': models = 2 > 1 is true\n" in result.stderr
    assert f"  to do: see what became of it in {out}; nothing was pushed\n" in result.stderr
    assert basis("verify", out).exit_code == 0
    assert snapshot(*family.values()) == before


def test_one_json_document_says_both_result_and_failure(basis: Basis, family: dict[str, Path], tmp_path: Path) -> None:
    result = merged(
        basis, family, "-o", tmp_path / "out", "--json", "--fail-if", "models > 1", "--fail-if", "models > 9"
    )
    document = json.loads(result.stdout)
    assert result.exit_code == document["exit_code"] == 4
    assert document["error"] == "GateFailed"
    assert document["output"] == str(tmp_path / "out")
    assert document["numbers"]["models"] == 2
    assert [gate["failed"] for gate in document["gates"]] == [True, False]


@pytest.mark.parametrize("expression", ["models >", "modles > 1"])
def test_a_gate_that_cannot_be_is_refused_before_the_work(
    basis: Basis, family: dict[str, Path], tmp_path: Path, expression: str
) -> None:
    result = merged(basis, family, "-o", tmp_path / "out", "--fail-if", expression)
    assert result.exit_code == 2
    assert not list(tmp_path.glob("out*"))


PLUGIN = '''
from basis_plugins.merge.ortho import Ortho
from basiscli import transform

@transform("merge", name="own")
class Own(Ortho):
    """Ortho with a number of its own."""

    def scale(self, norms):
        return super().scale(norms) | {"own": 7.0}
'''


def test_a_number_of_somebody_elses_method_is_known_after_the_work(
    basis: Basis, family: dict[str, Path], tmp_path: Path
) -> None:
    plugin, out = tmp_path / "own.py", tmp_path / "out"
    plugin.write_text(PLUGIN)
    words = [*(family[name] for name in "ab"), "--base", family["base"], "-m", "own", "--plugin", plugin, "-o", out]
    assert basis("merge", *words, "--fail-if", "own > 8").exit_code == 0
    assert basis("merge", *words, "--fail-if", "own > 6", "--overwrite").exit_code == 4
    assert basis("merge", *words, "--fail-if", "won > 6", "--overwrite").exit_code == 2
    assert known_numbers(Registry.with_files([plugin]).find("merge", "own")) is None
    assert "lambda" in (known_numbers(Registry.with_files([]).find("merge", "ortho")) or ())


def test_a_name_that_only_the_end_shows_to_be_wrong(basis: Basis, family: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = merged(basis, family, "-o", out, "--json", "--fail-if", "energy < 1")  # a number, of other commands
    assert result.exit_code == 2
    document = json.loads(result.stdout)
    assert document["what"] == "--fail-if 'energy < 1': no number 'energy'"
    assert document["output"] == str(out)
    assert basis("verify", out).exit_code == 0


def test_init_and_extract_have_gates(basis: Basis, family: dict[str, Path], tmp_path: Path) -> None:
    made = basis("init", family["a"], "-r", "2", "-o", tmp_path / "adapter", "--fail-if", "energy < 0.999")
    assert (made.exit_code, (tmp_path / "adapter").is_dir()) == (4, True)
    words = ["extract", family["a"], "--base", family["base"], "-r", "2", "-o", tmp_path / "taken"]
    assert basis(*words, "--fail-if", "rank_most > 2").exit_code == 0


def test_eval_knows_its_numbers_before_it_loads_anything(basis: Basis, family: dict[str, Path]) -> None:
    alone = basis("eval", family["a"], "--fail-if", "kl > 0.1")
    assert alone.exit_code == 2
    assert "no number 'kl'" in alone.stderr
