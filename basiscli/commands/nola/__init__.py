"""An adapter as a seed and coefficients of random bases: what `basis compress --method nola` does."""

from basiscli.cli.command import MAKES_MODEL, Command

command = Command(
    name="compress",
    help="Make a LoRA adapter smaller: a seed and coefficients of random bases.",
    package=__name__,
    options=".options:NolaOptions",
    plan=".api:plan",
    run=".api:run_adapter",
    view=".cli:NolaView",
    page=".page:contribute",
    terminal=MAKES_MODEL,
    makes="model",
)
