"""`basis extract`: a fine-tune as an adapter of its base; done by what does `basis init`."""

from basiscli.cli.command import MAKES_MODEL, Command

command = Command(
    name="extract",
    help="""Take a fine-tune out of a model as a LoRA adapter of its base (truncated SVD of the difference).""",
    package=__name__,
    options="basiscli.commands.init.api:ExtractOptions",
    plan="basiscli.commands.init.api:plan_difference",
    run="basiscli.commands.init.api:run_init",
    view="basiscli.commands.init.api:view",
    terminal=MAKES_MODEL,
    makes="model",
    position=40,
)
