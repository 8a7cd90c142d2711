"""`basis run`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from basiscli.cli import options
from basiscli.cli.gates_and_push import GatesAndPush
from basiscli.cli.output import Output, ProgressStyle, errors_shown
from basiscli.commands.merge.cli import merge_as_planned

if TYPE_CHECKING:
    from basiscli.commands.run.pipeline import Pipeline, StepResult
    from basiscli.commands.run.price import StepPlan


def run(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="A YAML file: steps, or a merge in mergekit's format.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder to make. [default: called as the recipe, here]", show_default=False
        ),
    ] = None,
    dtype: options.Dtype = None,
    allow_nonfinite: options.AllowNonfinite = False,
    allow_missing: options.AllowMissing = False,
    trust_remote_code: options.TrustRemoteCode = False,
    plugin: options.Plugins = None,
    device: options.Device = "auto",
    shard_size: options.ShardSize = "5GB",
    workers: options.Workers = None,
    memory: options.Memory = "1GB",
    engine: options.Engine = "local",
    ray_address: options.RayAddress = None,
    seed: options.Seed = 0,
    dry_run: options.DryRun = False,
    resume: options.Resume = True,
    overwrite: options.Overwrite = False,
    fail_if: options.FailIf = None,
    push_to: options.PushTo = None,
    private: options.Private = False,
    create_pr: options.CreatePr = False,
    progress: options.Progress = ProgressStyle.BAR,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Run a recipe: merge, init, compress, extract, expand, eval and push, each on what the steps before it made.

    Steps that are done are not done again while nothing they depend on changes. mergekit's recipes are read as they
    are. The options about how a merge runs are for those; a step's options are in its recipe.
    """
    out = Output(as_json=json, quiet=quiet, progress=progress)
    with errors_shown(as_json=json):
        from basiscli.commands.merge.api import RunOptions
        from basiscli.commands.merge.plan import MergePlan
        from basiscli.commands.run.api import plan_run
        from basiscli.commands.run.price import price
        from basiscli.errors import UsageError

        after = GatesAndPush(out, fail_if=fail_if, push_to=push_to, private=private, create_pr=create_pr)
        chosen: RunOptions = {
            "output": output,
            "plugins": plugin or [],
            "device": device,
            "dtype": dtype,
            "shard_size": shard_size,
            "workers": workers,
            "memory": memory,
            "engine": engine,  # type: ignore[typeddict-item]  # the plan refuses other words
            "ray_address": ray_address,
            "seed": seed,
            "resume": resume,
            "overwrite": overwrite,
            "allow_nonfinite": allow_nonfinite,
            "allow_missing": allow_missing,
            "trust_remote_code": trust_remote_code,
        }
        # A pipeline refuses what is about one merge: it must see only what was given.
        for name in [name for name in chosen if _is_default(context, name)]:
            del chosen[name]  # type: ignore[misc]
        if dry_run:
            chosen["headers_only"] = True
        planned = plan_run(recipe, **chosen)
        if isinstance(planned, MergePlan):
            merge_as_planned(planned, out, after, dry_run=dry_run)
            return
        if fail_if or push_to:
            raise UsageError("--fail-if and --push-to are about one merge", remedy="a step's fail_if, and a push step")
        if dry_run:
            plans = price(planned)
            out.result({"steps": [one.as_dict() for one in plans]}, lambda: _show_plans(out, plans))
            return
        _run_steps(planned, out)


def _is_default(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source("plugin" if name == "plugins" else name)
    return source is None or source.name == "DEFAULT"


def _run_steps(pipeline: Pipeline, out: Output) -> None:
    """Do the steps; a gate that fails still shows what was done."""
    from basiscli.errors import GateFailed

    done: list[StepResult] = []

    def finished(step: StepResult) -> None:
        done.append(step)
        _show_step(out, step)

    def document() -> dict[str, Any]:
        return {"output": str(pipeline.folder), "steps": [step.as_dict() for step in done]}

    def text() -> None:
        out.line(str(pipeline.folder))

    try:
        pipeline.run(out.progress(), finished)
    except GateFailed as error:
        raise out.failed(error, document(), text) from error
    out.result(document(), text)


def _show_step(out: Output, step: StepResult) -> None:
    where = step.url or step.path
    state = "nothing changed" if step.done_before else "done"
    out.note(f"{step.name} ({step.command}): {state}: {where}")
    for outcome in step.gates:
        out.note(f"{'failed' if outcome.failed else 'passed'}: {outcome}")


def _show_plans(out: Output, plans: list[StepPlan]) -> None:
    from basiscli.names import format_size

    def size(number: int | None) -> str:
        return "" if number is None else format_size(number)

    rows = [
        [
            plan.name,
            plan.command,
            "nothing changed" if plan.done_before else str(plan.path or ""),
            size(plan.read_bytes),
            size(plan.write_bytes),
            size(plan.peak_bytes),
            "" if plan.price is None else plan.price.time,
        ]
        for plan in plans
    ]
    out.table(["step", "command", "output", "reads", "writes", "memory", "time"], rows, right=[3, 4, 5, 6])
