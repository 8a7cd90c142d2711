"""Running a recipe: a pipeline of steps, or a merge in mergekit's format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from basiscli.commands.merge.api import MergeResult, RunOptions, run_merge
from basiscli.commands.merge.plan import MergePlan
from basiscli.commands.run.mergekit import KEYS, is_mergekit, parse_mergekit
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
    """What a recipe made."""

    path: Path
    """The merged model, or the folder that holds a pipeline's results."""
    steps: list[StepResult]
    """Of a pipeline."""
    merge: MergeResult | None = None
    """Of a recipe in mergekit's format."""


def run(
    recipe: str | Path,
    *,
    progress: Progress | None = None,
    finished: Callable[[StepResult], None] | None = None,
    **options: Unpack[RunOptions],
) -> RunResult:
    """Run a recipe and return what it made.

    Args:
        recipe: a YAML file: steps, or a merge in mergekit's format.
        progress: what to tell how far the work is.
        finished: called with the result of each step of a pipeline.
        **options: by name:

            output: the folder to make, or to hold a folder a step; by default called as the recipe.
            overwrite: replace an earlier output of basis; a pipeline always replaces what it made itself.
            headers_only: for `plan_run` of a recipe in mergekit's format, as for `merge`.
            plugins, device, dtype, shard_size, workers, memory, seed, resume, allow_nonfinite, allow_missing,
                trust_remote_code, engine, ray_address: as for `merge`, of a recipe in mergekit's format; a pipeline's
                steps have their own.

    Raises:
        UsageError, InputError, HubError, ResourceError: see `basiscli.errors`.
        GateFailed: a step's numbers are outside its `fail_if`; the steps after it are not done.
    """
    planned = plan_run(recipe, **options)
    if isinstance(planned, MergePlan):
        merged = run_merge(planned, progress or Silent())
        return RunResult(merged.path, [], merged)
    return RunResult(planned.folder, planned.run(progress or Silent(), finished or (lambda result: None)))


def plan_run(recipe: str | Path, **options: Unpack[RunOptions]) -> MergePlan | Pipeline:
    """Read a recipe and return the plan of its merge, or its pipeline, without writing anything."""
    file, output = Path(recipe), options.get("output")
    table = read_yaml(file)
    if is_mergekit(table):
        from basiscli.commands.run.mergekit_plan import plan_mergekit

        registry = Registry.with_files([Path(plugin) for plugin in options.get("plugins", ())])
        settings = run_settings(options, cluster_of(options, plan_run, str(file)))
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

    strange = sorted(set(options) - {"output", "overwrite", "headers_only"})
    if strange:
        raise UsageError(
            f"{', '.join(strange)}: the steps of a pipeline have options of their own",
            file=file,
            remedy="write them into the recipe's steps",
        )
    folder = Path(output if output is not None else file.stem).expanduser().resolve()
    return Pipeline(file, read_steps(table, file), folder, options.get("overwrite", False))
