"""`basis merge`: several fine-tuned models of one base into one."""

from basiscli.cli.command import MAKES_MODEL, Command

command = Command(
    name="merge",
    help="""Merge fine-tuned models of one base into one.

`basis merge a b c --method ortho` writes `./merge-ortho`: weights, configuration, tokenizer, model card and report.
An interrupted run goes on where it stopped when the same command is given again. `--dry-run` prints what it would
take; of models of the Hub that are not here, their headers alone are fetched.""",
    package=__name__,
    options=".options:MergeOptions",
    plan=".api:plan",
    run=".api:run_merge",
    view=".cli:MergeView",
    page=".page:contribute",
    terminal=MAKES_MODEL,
    makes="model",
    position=10,
)
