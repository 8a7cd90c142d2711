"""`basis eval`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from basiscli.cli import options
from basiscli.cli.gates_and_push import GatesAndPush
from basiscli.cli.output import Output, ProgressStyle, errors_shown
from basiscli.cli.save_recipe import saved

if TYPE_CHECKING:
    from basiscli.commands.evaluate.api import Evaluation


def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or Hub id (org/name@revision).")] = ".",
    text: Annotated[
        Path | None,
        typer.Option(
            help="Text, JSONL, a folder, or safetensors tokens. [default: a small built-in mix]", show_default=False
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="The model to hold it against, usually the one it was made from.")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens a window.")] = 512,
    windows: Annotated[int, typer.Option(help="How many windows, spread over the text.")] = 16,
    prefill: Annotated[str, typer.Option(help="How prompts attend to themselves: compressed or exact.")] = "compressed",
    contexts: Annotated[
        str | None, typer.Option(help="Time decoding after so many tokens: 512,2048.", show_default=False)
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded for each timing.")] = 16,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-evaluation-harness: arc_easy,hellaswag.", show_default=False),
    ] = None,
    task_path: Annotated[
        Path | None, typer.Option(help="Folder with task YAML files of your own.", show_default=False)
    ] = None,
    task_limit: Annotated[
        int | None, typer.Option(help="Examples of each task. [default: all]", show_default=False)
    ] = None,
    few_shot: Annotated[
        int | None, typer.Option(help="Solved examples before each. [default: the task's]", show_default=False)
    ] = None,
    device: options.Device = "auto",
    fail_if: options.FailIf = None,
    save_recipe: options.SaveRecipe = None,
    progress: options.Progress = ProgressStyle.BAR,
    json: options.Json = False,
    quiet: options.Quiet = False,
    config: options.Config = None,
) -> None:
    """Measure perplexity, next-token accuracy, tasks, cache size and speed of a model, alone or against another."""
    out = Output(as_json=json, quiet=quiet, progress=progress)
    with errors_shown(as_json=json):
        from basiscli.commands.evaluate.api import evaluate as measure
        from basiscli.commands.evaluate.api import number_names

        after, lengths = GatesAndPush(out, fail_if=fail_if), options.parse_integers("--contexts", contexts)
        named = [name.strip() for name in tasks.split(",")] if tasks else []
        after.before(number_names(pair=against is not None, contexts=lengths, tasks=named))
        result = saved(save_recipe, "eval", measure, fail_if=fail_if)(
            model,
            text=text,
            against=against,
            length=length,
            windows=windows,
            prefill=options.one_of("--prefill", prefill, ("compressed", "exact")),  # type: ignore[arg-type]
            contexts=lengths,
            new_tokens=new_tokens,
            tasks=named,
            task_path=task_path,
            task_limit=task_limit,
            few_shot=few_shot,
            device=device,
            progress=out.progress(),
        )
        after.done(result.as_dict(), lambda: _show(out, result), numbers=result.numbers, path=None)


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
