"""What the terminal shows of an evaluation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from basiscli.cli.output import Output
from basiscli.cli.session import Session
from basiscli.commands.evaluate.api import numbers_of, run
from basiscli.commands.evaluate.options import EvalOptions

if TYPE_CHECKING:
    from basiscli.commands.evaluate.api import Evaluation


def main(options: EvalOptions, session: Session) -> None:
    """Evaluate and print a table."""
    session.follow_up.before(numbers_of(options))
    result = run(options, session.progress())
    session.save(options)
    session.follow_up.done(result.as_dict(), lambda: _show(session.out, result), numbers=result.numbers, path=None)


def _show(out: Output, result: Evaluation) -> None:
    numbers, other = result.numbers, result.against
    columns = ["", Path(result.model.model).name or result.model.model]
    rows = [
        ["perplexity", f"{result.model.perplexity:.3f}"],
        ["next-token accuracy", f"{result.model.accuracy:.2%}"],
        ["cache, bytes a token", f"{result.model.cache_bytes_per_token:,.0f}"],
    ]
    rows += [[f"decode after {n}, tokens/s", f"{x:.2f}"] for n, x in result.model.decode_tokens_per_second.items()]
    rows += [[f"{one.task}, {one.metric}", f"{one.value:.4f}"] for one in result.model.tasks]
    if other is not None:
        pairs = zip(result.model.tasks, other.tasks, strict=True)
        columns += [Path(other.model).name or other.model, "ratio"]
        figures = [
            (f"{other.perplexity:.3f}", 1 + numbers["perplexity_increase"]),
            (f"{other.accuracy:.2%}", numbers["accuracy_kept"]),
            (f"{other.cache_bytes_per_token:,.0f}", numbers["cache_kept"]),
            *((f"{x:.2f}", numbers[f"decode_speedup_{n}"]) for n, x in other.decode_tokens_per_second.items()),
            *((f"{y.value:.4f}", x.value / y.value if y.value else math.nan) for x, y in pairs),
        ]
        rows = [[*row, text, f"{ratio:.3f}"] for row, (text, ratio) in zip(rows, figures, strict=True)]
    out.table(columns, rows, right=range(1, len(columns)))
    if other is not None:
        out.line(f"KL {result.kl:.4f} nats a token, same next token {result.agreement:.2%}")
    out.line(f"{result.tokens} tokens of {result.text}, prefill {result.prefill}, on {result.device}")
