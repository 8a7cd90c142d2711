"""`basis diff`: how two checkpoints differ."""

from basiscli.cli.command import SHOWS, Command

command = Command(
    name="diff",
    help="""Show how two checkpoints differ, tensor by tensor. Streams: memory does not grow with the model.""",
    package=__name__,
    options=".cli:DiffOptions",
    run=".cli:main",
    main=".cli:main",
    terminal=SHOWS,
    position=90,
)
