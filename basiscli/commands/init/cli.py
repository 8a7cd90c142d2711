"""`basis init` and `basis extract`."""

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
    from basiscli.commands.init.api import InitResult
    from basiscli.commands.init.plan import InitPlan
    from basiscli.reports.schema import Report

Rank = Annotated[
    int | None, typer.Option("--rank", "-r", help="Rank of every factor. [default: 16]", show_default=False)
]
Alpha = Annotated[
    float | None, typer.Option(help="PEFT's lora_alpha. [default: the rank: scaling 1]", show_default=False)
]
RsLora = Annotated[bool, typer.Option("--rslora", help="Scale by alpha / √rank.")]
Exact = Annotated[bool, typer.Option("--exact", help="Decompose exactly; else to 3e-3, measured.")]
Targets = Annotated[
    str, typer.Option("--target-modules", help="all-linear, names (q_proj,v_proj), or a regular expression.")
]


def init(
    model: Annotated[str, typer.Argument(help="Folder or Hub id (org/name@revision).")] = ".",
    method: Annotated[str, typer.Option("--method", "-m", help="`basis methods` lists them.")] = "pissa",
    rank: Rank = None,
    alpha: Alpha = None,
    rslora: RsLora = False,
    exact: Exact = False,
    target_modules: Targets = "all-linear",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder to make. [default: ./MODEL-METHOD]", show_default=False),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text whose activations eva and corda look at: file, folder, JSONL or safetensors tokens. "
            "[default: a built-in mix]",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of it. [default: 16384]", show_default=False)] = None,
    length: Annotated[int | None, typer.Option(help="Tokens a window. [default: 512]", show_default=False)] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            help="nf4: for a residual that will be loaded in 4 bits (pissa, olora).", metavar="nf4", show_default=False
        ),
    ] = None,
    rho: Annotated[
        float | None,
        typer.Option(help="eva: a module's rank is at most rho times the mean. [default: 2]", show_default=False),
    ] = None,
    whiten: Annotated[bool, typer.Option("--whiten", help="eva: scale A to inputs of variance 1.")] = False,
    no_center: Annotated[bool, typer.Option("--no-center", help="eva: leave the inputs' mean in.")] = False,
    bases: Annotated[
        int | None, typer.Option(help="nola: random matrices a factor. [default: 1024]", show_default=False)
    ] = None,
    parameters: Annotated[
        list[str] | None, typer.Option("--parameter", "-p", help="name=value of the method; repeatable.")
    ] = None,
    dtype: options.Dtype = None,
    allow_nonfinite: options.AllowNonfinite = False,
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
    """Make a LoRA adapter from a model's weights, and the residual that is its base, or from data (eva).

    `OUT/adapter` is plain PEFT and loads on `OUT/residual`; together they are the model. eva's loads on
    the model itself. `--dry-run` prints what it would take; of a model of the Hub that is not here, its headers
    alone are fetched.
    """
    out = Output(as_json=json, quiet=quiet, progress=progress)
    with errors_shown(as_json=json):
        from basiscli.commands.init.api import plan_init

        after = GatesAndPush(out, fail_if=fail_if, push_to=push_to, private=private, create_pr=create_pr)
        named = {"rho": rho, "whiten": whiten or None, "center": False if no_center else None, "bases": bases}
        given = options.parse_parameters(parameters or []) | {n: v for n, v in named.items() if v is not None}
        plan = saved(save_recipe, "init", plan_init, fail_if=fail_if, push_to=push_to)(
            model,
            method=method,
            parameters=given,
            calibration=calibration,
            tokens=tokens,
            length=length,
            quantize=quantize,  # type: ignore[arg-type]  # the plan refuses other words
            plugins=plugin or [],
            rank=rank,
            alpha=alpha,
            rslora=rslora,
            exact=exact,
            target_modules=_targets(target_modules),
            output=output,
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
        )
        _as_planned(plan, out, after, dry_run=dry_run)


def extract(
    model: Annotated[str, typer.Argument(help="The fine-tuned model.")],
    base: Annotated[str, typer.Option(help="What it was tuned from.")],
    rank: Rank = None,
    energy: Annotated[
        float | None,
        typer.Option(
            help="Instead of one rank: what holds this share of each difference's squared norm.", show_default=False
        ),
    ] = None,
    alpha: Alpha = None,
    rslora: RsLora = False,
    exact: Exact = False,
    target_modules: Targets = "all-linear",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder to make. [default: ./MODEL-extract]", show_default=False),
    ] = None,
    dtype: options.Dtype = None,
    allow_nonfinite: options.AllowNonfinite = False,
    device: options.Device = "auto",
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
    """Take a fine-tune out of a model as a LoRA adapter of its base (truncated SVD of the difference)."""
    out = Output(as_json=json, quiet=quiet, progress=progress)
    with errors_shown(as_json=json):
        from basiscli.commands.init.api import plan_extract

        after = GatesAndPush(out, fail_if=fail_if, push_to=push_to, private=private, create_pr=create_pr)
        plan = saved(save_recipe, "extract", plan_extract, fail_if=fail_if, push_to=push_to)(
            model,
            base=base,
            energy=energy,
            rank=rank,
            alpha=alpha,
            rslora=rslora,
            exact=exact,
            target_modules=_targets(target_modules),
            output=output,
            device=device,
            dtype=dtype,
            workers=workers,
            memory=memory,
            engine=engine,  # type: ignore[arg-type]  # the plan refuses other words
            ray_address=ray_address,
            seed=seed,
            resume=resume,
            overwrite=overwrite,
            headers_only=dry_run,
            allow_nonfinite=allow_nonfinite,
        )
        _as_planned(plan, out, after, dry_run=dry_run)


def _targets(text: str) -> str | list[str]:
    """Return names for a list of them, and anything else as it is: a keyword or a regular expression."""
    words = text.split(",")
    plain = all(word and word.replace("_", "").replace(".", "").isalnum() for word in words)
    return words if plain and text != "all-linear" else text


def _as_planned(plan: InitPlan, out: Output, after: GatesAndPush, *, dry_run: bool) -> None:
    from basiscli.commands.init.api import run_init

    execute(
        plan, run_init, out, after, dry_run=dry_run, document=_plan_document, show=_show_plan, summary=_summary,
        known=known_numbers(plan.method), places=_places,
    )  # fmt: skip


def _places(made: InitResult) -> dict[str, str | None]:
    # Not under `adapter`: the report has that for itself.
    residual = str(made.residual) if made.residual else None
    return {"adapter_folder": str(made.adapter), "residual_folder": residual}


def _summary(report: Report) -> str:
    from basiscli.names import format_size

    numbers, cost, adapter = report.numbers, report.cost, report.adapter
    assert adapter is not None
    error = f"; residual + adapter is the model to {numbers['error_most']:.1e}" if "error_most" in numbers else ""
    least, most = numbers["rank_least"], numbers["rank_most"]
    if adapter.trains == "coefficients":
        return (
            f"{numbers['modules']:.0f} modules of rank {least:.0f}, {numbers['adapter_parameters']:,.0f} coefficients, "
            f"{format_size(cost.written_bytes)}; the base stays as it is"
        )
    of_data = adapter.calibration and "error_most" not in numbers
    nf4 = f"; in NF4 its error is {numbers['nf4_error_reduction']:.1%} below QLoRA’s" if adapter.quantize else ""
    text = f" on {adapter.calibration.tokens:,} tokens" if adapter.calibration else ""
    return (
        f"{numbers['modules']:.0f} modules of rank {least:.0f}{'' if least == most else f' to {most:.0f}'}, "
        f"{numbers['adapter_parameters']:,.0f} parameters: {numbers['energy']:.1%} of the "
        f"{'inputs’ variance' if of_data else 'energy'} ({numbers['energy_least']:.1%} at least){text}{error}{nf4}\n"
        f"{format_size(cost.written_bytes)} in {cost.seconds:.1f} s, "
        f"peak memory {format_size(cost.peak_memory_bytes)} on {cost.device}"
    )


def _plan_document(plan: InitPlan) -> dict[str, Any]:
    return {
        "output": str(plan.out),
        "method": plan.method.name,
        "parameters": plan.values.model_dump(mode="json"),
        "model": plan.model.source.spec,
        "base": plan.base.source.spec if plan.base else None,
        "rank": plan.rank,
        "energy": plan.energy,
        "alpha": plan.alpha_of(plan.rank),
        "quantize": plan.quantize,
        "calibration": vars(plan.calibration) if plan.calibration else None,
        "modules": list(plan.targets.values()),
        "write_bytes": plan.expected_bytes,
        "peak_bytes": plan.peak_bytes,
        "price": plan.price().as_dict(),
        "notes": plan.notes,
    }


def _show_plan(out: Output, plan: InitPlan) -> None:
    from basiscli.names import format_size

    out.line(f"{plan.method.name} {plan.model.source.spec} → {plan.out}")
    rank = f"rank {plan.rank}" if plan.ranks_known else f"mean rank {plan.rank}"
    if plan.energy is not None:
        rank = f"what rank {plan.energy:.0%} of the energy takes, {plan.rank} at most"
    trained = {"values": "singular values trained", "coefficients": "coefficients of random bases trained"}
    form = trained.get(plan.method.trains, f"scaling {plan.scaling(plan.rank):g}")
    out.line(f"{len(plan.targets)} modules of {rank}, {form}")
    if plan.quantize is not None:
        out.line(f"factors make up for a residual in {plan.quantize}")
    if plan.calibration is not None:
        text = plan.calibration.place or "built-in mix"
        out.line(f"inputs of {plan.calibration.tokens:,} tokens in windows of {plan.calibration.length}: {text}")
    for note in plan.notes:
        out.line(f"note: {note}")
    price = plan.price()
    memory = f"memory for tensors at most {format_size(plan.peak_bytes)}"
    out.line(f"read {format_size(price.read_bytes)}, write {format_size(plan.expected_bytes)}, {memory}")
    out.line(price.sentence())
