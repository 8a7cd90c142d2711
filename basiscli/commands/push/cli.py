"""`basis push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from basiscli.cli import options
from basiscli.cli.gates_and_push import note_push
from basiscli.cli.output import Output, ProgressStyle, errors_shown


def push(
    folder: Annotated[Path, typer.Argument(help="What a command wrote.")],
    target: Annotated[str, typer.Argument(metavar="ORG/NAME[@BRANCH]", help="Model of the Hub; made if need be.")],
    private: Annotated[bool, typer.Option("--private", help="Make the model private.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch; made if need be. [default: main]", show_default=False)
    ] = None,
    message: Annotated[
        str | None, typer.Option("--message", help="Of the commit. [default: the command]", show_default=False)
    ] = None,
    progress: options.Progress = ProgressStyle.BAR,
    json: options.Json = False,
    quiet: options.Quiet = False,
    config: options.Config = None,
) -> None:
    """Push an output to the Hub, after every tensor is checked, in one commit.

    Only complete outputs, and never code, save what `--export remote-code` wrote. Interrupted, the same command sends
    only what is missing. Log in with `hf auth login`, or set HF_TOKEN.
    """
    out = Output(as_json=json, quiet=quiet, progress=progress)
    with errors_shown(as_json=json):
        from basiscli.commands.push.api import push as api_push

        pushed = api_push(
            folder,
            target,
            private=private,
            create_pr=create_pr,
            revision=revision,
            message=message,
            progress=out.progress(),
        )
        note_push(out, pushed)
        out.result(pushed.as_dict(), lambda: out.line(pushed.url))
