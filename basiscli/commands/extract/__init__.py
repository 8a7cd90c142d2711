"""`basis extract`: a fine-tune as an adapter of its base; done by what does `basis init`."""

from basiscli.cli.command import MAKES_MODEL, Command, OwnMethod

command = Command(
    name="extract",
    help="""Take a fine-tune out of a model as a LoRA adapter of its base (truncated SVD of the difference).""",
    package=__name__,
    options="basiscli.commands.init.api:ExtractOptions",
    plan="basiscli.commands.init.api:plan_difference",
    run="basiscli.commands.init.api:run_init",
    view="basiscli.commands.init.api:view",
    page="basiscli.commands.init.api:page",
    terminal=MAKES_MODEL,
    makes="model",
    own_methods=(
        OwnMethod(
            "extract",
            "The best approximation of the difference of two weights: B = U_r √Σ_r, A = √Σ_r V_rᵀ.",
            "truncated SVD: Eckart and Young 1936",
        ),
    ),
    position=40,
)
