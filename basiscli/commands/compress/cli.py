"""`basis compress`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from basiscli.cli import options
from basiscli.cli.execute import execute
from basiscli.cli.gates_and_push import GatesAndPush, known_numbers
from basiscli.cli.output import Output, ProgressStyle, errors_shown
from basiscli.cli.save_recipe import saved
from basiscli.commands.nola.cli import compress_adapter

if TYPE_CHECKING:
    from basiscli.commands.kv.plan import KVPlan
    from basiscli.reports.schema import Report

_TRAINING = "Training and search"
_NOLA = "An adapter: --method nola"


def compress(
    model: Annotated[str, typer.Argument(help="Folder or Hub id (org/name@revision); with nola an adapter.")] = ".",
    kv_ratio: Annotated[
        float | None, typer.Option("--kv-ratio", help="Share of the KV cache to remove: 0.6 leaves 40 % of its bytes.")
    ] = None,
    kv_budget: Annotated[
        float | None, typer.Option("--kv-budget", help="The same said as the share to keep: 0.4.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder to make. [default: ../MODEL-kvRATIO]", show_default=False),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Text, JSONL, a folder, or safetensors tokens. [default: a small built-in mix]", show_default=False
        ),
    ] = None,
    method: Annotated[
        str, typer.Option("--method", "-m", help="`basis methods` lists them; nola is for LoRA adapters.")
    ] = "matryoshka",
    parameters: Annotated[
        list[str] | None, typer.Option("--parameter", "-p", help="name=value of the method; repeatable.")
    ] = None,
    fold_v: Annotated[
        bool, typer.Option("--fold-v", help="Put the bases of the values into the weights: they then cost nothing.")
    ] = False,
    export: Annotated[
        str | None,
        typer.Option(help="remote-code: also for plain transformers, with trust_remote_code.", show_default=False),
    ] = None,
    train_steps: Annotated[int, typer.Option(help="Steps of training; 0 for none.", rich_help_panel=_TRAINING)] = 800,
    batch: Annotated[int, typer.Option(help="Windows a step.", rich_help_panel=_TRAINING)] = 2,
    length: Annotated[int, typer.Option(help="Tokens a window.", rich_help_panel=_TRAINING)] = 256,
    search: Annotated[
        str,
        typer.Option(help="How ranks are found: greedy, spectrum or uniform.", rich_help_panel=_TRAINING),
    ] = "greedy",
    bases: Annotated[
        int | None, typer.Option(help="Random matrices a factor.", show_default=False, rich_help_panel=_NOLA)
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank",
            "-r",
            help="Of the result. [default: what the bases span]",
            show_default=False,
            rich_help_panel=_NOLA,
        ),
    ] = None,
    bits: Annotated[int, typer.Option(help="Of a coefficient: 16, 8 or 4.", rich_help_panel=_NOLA)] = 16,
    base: Annotated[
        str | None,
        typer.Option(help="The base. [default: the adapter's]", show_default=False, rich_help_panel=_NOLA),
    ] = None,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Without a base: match the matrices.", rich_help_panel=_NOLA)
    ] = False,
    steps: Annotated[int, typer.Option(help="Steps on the adapter's logits.", rich_help_panel=_NOLA)] = 200,
    learning_rate: Annotated[
        float, typer.Option(help="Of those, as a share of the coefficients' size.", rich_help_panel=_NOLA)
    ] = 0.02,
    min_fidelity: Annotated[
        float, typer.Option(help="Share of the effect that must survive.", rich_help_panel=_NOLA)
    ] = 0.5,
    force: Annotated[bool, typer.Option("--force", help="Write it all the same.", rich_help_panel=_NOLA)] = False,
    dtype: options.Dtype = None,
    plugin: options.Plugins = None,
    device: options.Device = "auto",
    shard_size: options.ShardSize = "5GB",
    workers: options.Workers = None,
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
    """Make a model's KV cache smaller by trained orthogonal projections.

    `basis compress --kv-ratio 0.6` inside a checkpoint folder `m` writes `../m-kv0.6`, which `basiscli.load` opens. A
    result can be compressed again at another ratio: its bases stay, only the ranks are searched. An interrupted run
    goes on where it stopped when the same command is given again.

    `basis compress ADAPTER --method nola --bases 256` makes a LoRA adapter smaller: a seed and two times 256
    coefficients a module, of which the report says how much of the adapter's effect they keep.
    """
    out = Output(as_json=json, quiet=quiet, progress=progress)
    with errors_shown(as_json=json):
        from basiscli.commands.kv.api import plan_compress, run_compress

        after = GatesAndPush(out, fail_if=fail_if, push_to=push_to, private=private, create_pr=create_pr)
        if method == "nola":
            from basiscli.commands.nola.api import plan_adapter

            options.one_of("--method nola is done here: --engine", engine, ("local",))
            given = {
                "base": base, "rank": rank, "bits": bits, "output": output, "calibration": calibration,
                "weights_only": weights_only, "steps": steps, "batch": batch, "length": length,
                "learning_rate": learning_rate, "min_fidelity": min_fidelity, "force": force, "device": device,
                "seed": seed, "overwrite": overwrite, "headers_only": dry_run,
            }  # fmt: skip
            planner = saved(save_recipe, "compress", plan_adapter, fail_if=fail_if, push_to=push_to, method="nola")
            compress_adapter(out, after, planner, model, bases=bases, dry_run=dry_run, options=given)
            return
        plan = saved(save_recipe, "compress", plan_compress, fail_if=fail_if, push_to=push_to)(
            model,
            kv_ratio=kv_ratio,
            kv_budget=kv_budget,
            method=method,
            parameters=options.parse_parameters(parameters or []),
            output=output,
            calibration=calibration,
            train_steps=train_steps,
            batch=batch,
            length=length,
            search=options.one_of("--search", search, ("greedy", "spectrum", "uniform")),  # type: ignore[arg-type]
            fold_values=fold_v,
            export=options.one_of("--export", export, ("remote-code",)) if export else None,  # type: ignore[arg-type]
            plugins=plugin or [],
            device=device,
            dtype=dtype,
            shard_size=shard_size,
            workers=workers,
            engine=engine,  # type: ignore[arg-type]  # the plan refuses other words
            ray_address=ray_address,
            seed=seed,
            resume=resume,
            overwrite=overwrite,
            headers_only=dry_run,
        )
        execute(
            plan, run_compress, out, after, dry_run=dry_run, document=_plan_document, show=_show_plan, summary=_summary,
            known=known_numbers(plan.method), forecast=[*_forecast(plan), plan.price().sentence()],
        )  # fmt: skip


def _forecast(plan: KVPlan) -> list[str]:
    """Return what a person wants to know before it begins."""
    lines = []
    if plan.settings.calibration is None:
        lines.append("calibration with the small built-in mix; text of your own kind is better: --calibration FILE")
    if plan.train_steps:
        tokens = f"{plan.settings.batch} × {plan.settings.length} tokens"
        lines.append(f"training {plan.train_steps} steps of {tokens}")
    return lines


def _summary(report: Report) -> str:
    from basiscli.names import format_size

    kv, cost = report.kv, report.cost
    assert kv is not None
    keys, values = (sum(map(sum, ranks)) / sum(map(len, ranks)) for ranks in (kv.key_ranks, kv.value_ranks))
    lines = [
        f"removed {1 - kv.kept:.1%}, kept {kv.kept:.1%}: {kv.kept * kv.head_dim:.1f} of {kv.head_dim} dims a head on "
        f"average ({keys:.1f} of keys, {values:.1f} of values); {kv.bytes_per_token:,} bytes a token, "
        f"{kv.dense_bytes_per_token:,} before"
    ]
    each = (cost.seconds_of or {}).get("a round of the search")
    if each is not None:
        lines.append(
            f"searched in {report.numbers['search_rounds']:.0f} rounds of "
            f"{each:.2f} s; KL to the dense model {report.numbers['search_kl']:.4f}"
        )
    parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in (cost.seconds_of or {}).items() if seconds >= 0.5)
    peak = format_size(cost.peak_memory_bytes)
    lines.append(f"{cost.seconds:.0f} s ({parts}), peak memory {peak} on {cost.device}")
    return "\n".join(lines)


def _plan_document(plan: KVPlan) -> dict[str, Any]:
    return {
        "output": str(plan.out),
        "method": plan.method.name,
        "parameters": plan.values.model_dump(mode="json"),
        "model": plan.model.source.spec,
        "kv_ratio": plan.ratio,
        "kept": plan.kept,
        "layers": plan.shape.layers,
        "kv_heads": plan.shape.heads,
        "head_dim": plan.shape.dim,
        "train_steps": plan.train_steps,
        "train_tokens": plan.train_tokens,
        "search": plan.settings.search,
        "write_bytes": plan.layout.nbytes,
        "peak_bytes": plan.peak_bytes,
        "price": plan.price().as_dict(),
        "notes": plan.notes,
    }


def _show_plan(out: Output, plan: KVPlan) -> None:
    from basiscli.names import format_size

    out.line(f"{plan.method.name} {plan.model.source.spec} → {plan.out}")
    out.line(
        f"{plan.shape.layers} layers of {plan.shape.heads} KV heads of {plan.shape.dim} dimensions: "
        f"removed {1 - plan.kept:.1%}, kept {plan.kept:.1%}, {plan.kept * plan.shape.dim:.1f} dims a head"
    )
    for note in [*plan.notes, *_forecast(plan)]:
        out.line(f"note: {note}")
    price = plan.price()
    memory = f"memory for tensors about {format_size(plan.peak_bytes)}"
    out.line(f"read {format_size(price.read_bytes)}, write {format_size(price.write_bytes)}, {memory}")
    out.line(price.sentence())
