"""`basis push`: an output to the Hub."""

from basiscli.cli.command import SHOWS, Command

command = Command(
    name="push",
    help="""Push an output to the Hub, after every tensor is checked, in one commit.

Only complete outputs, and never code, save what `--export remote-code` wrote. Interrupted, the same command sends
only what is missing. Log in with `hf auth login`, or set HF_TOKEN.""",
    package=__name__,
    options=".options:PushOptions",
    run=".api:run",
    main=".cli:main",
    terminal=(*SHOWS, "config"),
    makes="commit",
    position=120,
)
