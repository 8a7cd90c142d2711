"""`basis init`: an adapter from a model's weights, or from data."""

from basiscli.cli.command import MAKES_MODEL, Command

command = Command(
    name="init",
    help="""Make a LoRA adapter from a model's weights, and the residual that is its base, or from data (eva).

`OUT/adapter` is plain PEFT and loads on `OUT/residual`; together they are the model. eva's loads on
the model itself. `--dry-run` prints what it would take; of a model of the Hub that is not here, its headers
alone are fetched.""",
    package=__name__,
    options=".options:InitOptions",
    plan=".api:plan",
    run=".api:run_init",
    view=".cli:InitView",
    page=".page:contribute",
    terminal=MAKES_MODEL,
    makes="model",
    position=30,
)
