"""`basis verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from basiscli.cli import options
from basiscli.cli.output import Output, ProgressStyle, errors_shown

if TYPE_CHECKING:
    from basiscli.commands.verify.api import Verification


def verify(
    folder: Annotated[str, typer.Argument(help="A checkpoint or adapter, or both as `init` made them.")] = ".",
    progress: options.Progress = ProgressStyle.BAR,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Check a checkpoint: structure of every file, and digests against its report. Exit code 3 if anything is wrong."""
    out = Output(as_json=json, quiet=quiet, progress=progress)
    with errors_shown(as_json=json):
        from basiscli.commands.verify.api import verify as api_verify

        found = api_verify(folder, progress=out.progress())
        out.result(found.as_dict(), lambda: _show(out, found))


def _show(out: Output, found: Verification) -> None:
    if found.checked_digests:
        out.line(f"ok: {found.tensors} tensors, every digest as {found.report} says")
    else:
        out.line(
            f"ok: {found.tensors} tensors, structure only: there is no {found.report} with digests to check against"
        )
