"""`basis merge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from basiscli.cli import options
from basiscli.cli.execute import execute
from basiscli.cli.gates_and_push import GatesAndPush, known_numbers
from basiscli.cli.output import Output, ProgressStyle, errors_shown
from basiscli.cli.save_recipe import saved

if TYPE_CHECKING:
    from basiscli.commands.merge.plan import MergePlan
    from basiscli.reports.schema import Report


def merge(
    models: Annotated[
        list[str], typer.Argument(help="Folders, Hub ids (org/name@revision) or LoRA adapters, in order.")
    ],
    method: Annotated[str, typer.Option("--method", "-m", help="`basis methods` lists them.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder to make. [default: ./merge-METHOD]", show_default=False),
    ] = None,
    base: Annotated[str | None, typer.Option(help="The common base. [default: the one that all models name]")] = None,
    onto: Annotated[str | None, typer.Option(help="Continue an earlier merge by the same method.")] = None,
    parameters: Annotated[
        list[str] | None, typer.Option("--parameter", "-p", help="name=value of the method; repeatable.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="One number a model: 1,0.5,2.")] = None,
    as_adapter: Annotated[bool, typer.Option("--as-adapter", help="Write a LoRA adapter (ortho of adapters).")] = False,
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
    save_recipe: options.SaveRecipe = None,
    progress: options.Progress = ProgressStyle.BAR,
    json: options.Json = False,
    quiet: options.Quiet = False,
    config: options.Config = None,
) -> None:
    """Merge fine-tuned models of one base into one.

    `basis merge a b c --method ortho` writes `./merge-ortho`: weights, configuration, tokenizer, model card and report.
    An interrupted run goes on where it stopped when the same command is given again. `--dry-run` prints what it would
    take; of models of the Hub that are not here, their headers alone are fetched.
    """
    out = Output(as_json=json, quiet=quiet, progress=progress)
    with errors_shown(as_json=json):
        from basiscli.commands.merge.api import plan_merge

        after = GatesAndPush(out, fail_if=fail_if, push_to=push_to, private=private, create_pr=create_pr)
        plan = saved(save_recipe, "merge", plan_merge, fail_if=fail_if, push_to=push_to)(
            models,
            method=method,
            base=base,
            onto=onto,
            parameters=options.parse_parameters(parameters or []),
            weights=options.parse_weights(weights),
            output=output,
            as_adapter=as_adapter,
            plugins=plugin or [],
            device=device,
            dtype=dtype,
            shard_size=shard_size,
            workers=workers,
            memory=memory,
            engine=engine,  # type: ignore[arg-type]  # the plan refuses other words
            ray_address=ray_address,
            seed=seed,
            resume=resume,
            overwrite=overwrite,
            headers_only=dry_run,
            allow_nonfinite=allow_nonfinite,
            allow_missing=allow_missing,
            trust_remote_code=trust_remote_code,
        )
        merge_as_planned(plan, out, after, dry_run=dry_run)


def merge_as_planned(plan: MergePlan, out: Output, after: GatesAndPush, *, dry_run: bool) -> None:
    """Show a plan, or do what it says and show what came of it."""
    from basiscli.commands.merge.api import run_merge

    execute(
        plan, run_merge, out, after, dry_run=dry_run, document=_plan_document, show=_show_plan, summary=_summary,
        known=known_numbers(plan.method),
    )  # fmt: skip


def _summary(report: Report) -> str:
    """Return what a person wants to know when it is done."""
    from basiscli.names import format_size

    cost, lines = report.cost, []
    if report.task_vectors is not None:
        models = [source for source in report.sources if source.role != "base"]
        norms = zip(models, report.task_vectors.norms, strict=True)
        lines.append("task vectors: " + ", ".join(f"{Path(s.spec).name} {norm:.4g}" for s, norm in norms))
        cosines = [c for i, row in enumerate(report.task_vectors.cosines) for c in row[:i] if c is not None]
        merged = f"merged: norm {report.task_vectors.merged_norm:.4g}"
        merged += f", λ = {report.numbers['lambda']:.4g}" if "lambda" in report.numbers else ""
        merged += f"; inputs' cosines {min(cosines):.3f} to {max(cosines):.3f}" if cosines else ""
        lines.append(merged)
    resumed = f", {cost.resumed_steps} steps were done before" if cost.resumed_steps else ""
    lines.append(
        f"{report.numbers['tensors']:.0f} tensors, {format_size(cost.written_bytes)} in {cost.seconds:.1f} s, "
        f"peak memory {format_size(cost.peak_memory_bytes)} on {cost.device}{resumed}"
    )
    return "\n".join(lines)


def _plan_document(plan: MergePlan) -> dict[str, Any]:
    return {
        "output": str(plan.out),
        "method": plan.method.name,
        "parameters": plan.parameters,
        "base": plan.base.source.spec if plan.base else None,
        "models": [model.source.spec for model in plan.models],
        "weights": plan.weights,
        "read_bytes": plan.read_bytes,
        "write_bytes": plan.write_bytes,
        "scratch_bytes": plan.scratch_bytes,
        "peak_bytes": plan.peak_bytes,
        "price": plan.price().as_dict(),
        "notes": plan.notes,
        "files": [{"name": shard.file, "bytes": shard.nbytes} for shard in plan.layout.shards],
        "tensors": [
            {"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "bytes": t.nbytes, "file": shard.file}
            for shard in plan.layout.shards
            for t in shard.tensors
        ],
    }


def _show_plan(out: Output, plan: MergePlan) -> None:
    from basiscli.names import format_count, format_size

    parameters = "".join(f" {name}={value}" for name, value in plan.parameters.items())
    out.line(f"{plan.method.name}{parameters} → {plan.out}")
    rows = [["base", plan.base.source.spec]] if plan.base else []
    rows += [[f"model {n}", model.source.spec] for n, model in enumerate(plan.models, start=1)]
    out.table(["input", "from"], rows)
    out.line()
    sizes = [[shard.file, str(len(shard.tensors)), format_size(shard.nbytes)] for shard in plan.layout.shards]
    out.table(["file", "tensors", "size"], sizes, right=[1, 2])
    out.line()
    for note in plan.notes:
        out.line(f"note: {note}")
    workers = format_count(plan.settings.workers, "worker")
    scratch = f", scratch {format_size(plan.scratch_bytes)}" if plan.scratch_bytes else ""
    out.line(
        f"read {format_size(plan.read_bytes)}, write {format_size(plan.write_bytes)}{scratch}, "
        f"memory for tensors at most {format_size(plan.peak_bytes)} with {workers}"
    )
    out.line(plan.price().sentence())
