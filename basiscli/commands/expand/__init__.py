"""`basis expand`: an adapter as what everything can load."""

from basiscli.cli.command import SHOWS, Command

command = Command(
    name="expand",
    help="""Turn an adapter into what everything can load: plain LoRA of the original base, or a full checkpoint.""",
    package=__name__,
    options=".options:ExpandOptions",
    run=".api:run",
    main=".cli:main",
    terminal=("push_to", "private", "create_pr", "save_recipe", *SHOWS, "config"),
    makes="model",
    position=50,
)
