"""The command line. Parses, calls the API, shows results; no mathematics and no files here.

Importing it must stay cheap: commands import what they need when they run.
"""

from __future__ import annotations

from typing import Annotated

import typer

from basiscli.commands.compress import cli as compress
from basiscli.commands.demo import cli as demo
from basiscli.commands.diff import cli as diff
from basiscli.commands.evaluate import cli as evaluate
from basiscli.commands.expand import cli as expand
from basiscli.commands.init import cli as init
from basiscli.commands.inspect import cli as inspect
from basiscli.commands.merge import cli as merge
from basiscli.commands.methods import cli as methods
from basiscli.commands.push import cli as push
from basiscli.commands.report import cli as report
from basiscli.commands.run import cli as run
from basiscli.commands.verify import cli as verify
from basiscli.version import __version__

app = typer.Typer(
    name="basis",
    help="Model surgery: merge, compress and initialise checkpoints and adapters.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("merge")(merge.merge)
app.command("compress")(compress.compress)
app.command("init")(init.init)
app.command("extract")(init.extract)
app.command("expand")(expand.expand)
app.command("eval")(evaluate.evaluate)
app.command("run")(run.run)
app.command("inspect")(inspect.inspect)
app.command("diff")(diff.diff)
app.command("report")(report.report)
app.command("verify")(verify.verify)
app.command("push")(push.push)
app.add_typer(methods.app, name="methods")
app.command("demo")(demo.demo)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"basis {__version__}")  # noqa: T201
        raise typer.Exit


@app.callback()
def _basis(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line."""
    app()
