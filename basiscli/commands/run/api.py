"""Running a recipe: a pipeline of steps, or a merge in mergekit's format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from basiscli.cli.keywords import keywords
from basiscli.commands.merge.api import MergePlan, MergeResult, run_merge
from basiscli.commands.run.mergekit import KEYS, is_mergekit, parse_mergekit
from basiscli.commands.run.options import RunOptions
from basiscli.commands.run.reading import read_yaml
from basiscli.engine.cluster import cluster_of
from basiscli.engine.settings import run_settings
from basiscli.errors import InputError, UsageError, did_you_mean
from basiscli.progress import Progress, Silent
from basiscli.registry import Registry

if TYPE_CHECKING:
    from basiscli.commands.run.pipeline import Pipeline, StepResult


@dataclass(frozen=True)
class RunResult:
    """The results of a recipe."""

    path: Path
    """The merged model, or the folder that holds a pipeline's results."""
    steps: list[StepResult]
    """One per step of a pipeline; empty for a recipe in mergekit's format."""
    merge: MergeResult | None = None
    """The result of a recipe in mergekit's format."""


@keywords(RunOptions)
def run(
    recipe: str | Path,
    *,
    progress: Progress | None = None,
    finished: Callable[[StepResult], None] | None = None,
    **options: Any,
) -> RunResult:
    """Run a recipe and return its results.

    Args:
        recipe: a YAML file: steps, or a merge in mergekit's format.
        progress: a progress display; none by default.
        finished: called with the result of each step of a pipeline.
        **options: by name:

    Raises:
        UsageError, InputError, HubError, ResourceError: see `basiscli.errors`.
        GateFailed: a step's numbers are outside its `fail_if`; the steps after it are not run.
    """
    planned = plan_run(recipe, **options)
    if isinstance(planned, MergePlan):
        merged = run_merge(planned, progress or Silent())
        return RunResult(merged.path, [], merged)
    return RunResult(planned.folder, planned.run(progress or Silent(), finished or (lambda result: None)))


def do(options: RunOptions, progress: Progress) -> RunResult:
    """Run the recipe with these options, as `run` does."""
    return run(**options.given(), progress=progress)


@keywords(RunOptions)
def plan_run(recipe: str | Path, **options: Any) -> MergePlan | Pipeline:
    """Return the plan of a recipe's merge, or its pipeline of steps, without writing anything."""
    return plan(RunOptions.of(recipe=recipe, **options))


def plan(options: RunOptions) -> MergePlan | Pipeline:
    """Return the plan of the recipe that the options name; see `plan_run`."""
    file, output = options.recipe, options.output
    table = read_yaml(file)
    if is_mergekit(table):
        from basiscli.commands.run.mergekit_plan import plan_mergekit

        registry = Registry.with_files(options.plugins)
        settings = run_settings(
            dict(options), cluster_of(dict(options), partial(_plan_of_merge, options.on_a_worker()))
        )
        return plan_mergekit(parse_mergekit(table, file), file, registry, out=output, settings=settings)
    if "steps" not in table:
        key = next(iter(table), "")
        raise InputError(
            f"neither a pipeline nor a merge of mergekit's: '{key}'",
            file=file,
            remedy=f"{did_you_mean(key, {'steps', *KEYS})}; see docs/recipes.md",
        )
    from basiscli.commands.run.pipeline import Pipeline
    from basiscli.commands.run.steps import read_steps

    strange = sorted(set(options.given()) - {"recipe", "output", "overwrite", "headers_only"})
    if strange:
        raise UsageError(
            f"{', '.join(strange)}: the steps of a pipeline have options of their own",
            file=file,
            remedy="write them into the recipe's steps",
        )
    folder = Path(output if output is not None else file.stem).expanduser().resolve()
    return Pipeline(file, read_steps(table, file), folder, options.overwrite)


def _plan_of_merge(options: RunOptions) -> MergePlan:
    planned = plan(options)
    assert isinstance(planned, MergePlan)  # what the driver read is there on every machine
    return planned
