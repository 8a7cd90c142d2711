"""`basis inspect`: what is in a checkpoint or adapter."""

from basiscli.cli.command import Command

command = Command(
    name="inspect",
    help=(
        "Show what is in a checkpoint or adapter, from its headers: no weights are read, and none fetched from the Hub."
    ),
    package=__name__,
    options=".cli:InspectOptions",
    run=".cli:main",
    main=".cli:main",
    terminal=("as_json",),
    position=80,
)
