"""`basis expand`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from basiscli.cli import options
from basiscli.cli.gates_and_push import GatesAndPush
from basiscli.cli.output import Output, ProgressStyle, errors_shown
from basiscli.cli.save_recipe import saved


def expand(
    adapter: Annotated[str, typer.Argument(help="A LoRA adapter: folder or Hub id.")],
    initial: Annotated[
        str | None,
        typer.Option(help="The adapter its training began with (basis init): gives plain LoRA of twice the rank."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The base to add it to; with --initial, the original model's name.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder to make. [default: ./ADAPTER-merged or -lora]", show_default=False),
    ] = None,
    overwrite: options.Overwrite = False,
    push_to: options.PushTo = None,
    private: options.Private = False,
    create_pr: options.CreatePr = False,
    save_recipe: options.SaveRecipe = None,
    progress: options.Progress = ProgressStyle.BAR,
    json: options.Json = False,
    quiet: options.Quiet = False,
    config: options.Config = None,
) -> None:
    """Turn an adapter into what everything can load: plain LoRA of the original base, or a full checkpoint."""
    out = Output(as_json=json, quiet=quiet, progress=progress)
    with errors_shown(as_json=json):
        from basiscli.commands.expand.api import expand as api_expand

        after = GatesAndPush(out, push_to=push_to, private=private, create_pr=create_pr)
        after.before(None)
        done = saved(save_recipe, "expand", api_expand, push_to=push_to)(
            adapter, initial=initial, base=base, output=output, overwrite=overwrite, progress=out.progress()
        )
        out.note(f"{done.kind}: {done.modules} modules")
        document = asdict(done) | {"path": str(done.path)}
        after.done(document, lambda: out.line(str(done.path)), numbers={}, path=done.path)
