"""`basis expand`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from basiscli.cli import options
from basiscli.cli.output import Output, errors_shown


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
    json: options.Json = False,
    quiet: options.Quiet = False,
    config: options.Config = None,
) -> None:
    """Turn an adapter into what everything can load: plain LoRA of the original base, or a full checkpoint."""
    out = Output(as_json=json, quiet=quiet)
    with errors_shown(as_json=json):
        from basiscli.api.expand import expand as api_expand

        done = api_expand(
            adapter, initial=initial, base=base, output=output, overwrite=overwrite, progress=out.progress()
        )
        out.note(f"{done.kind}: {done.modules} modules")
        out.result(asdict(done) | {"path": str(done.path)}, lambda: out.line(str(done.path)))
