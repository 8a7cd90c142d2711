"""`basis demo`: the main job on real models."""

from basiscli.cli.command import Command

command = Command(
    name="demo",
    help="""Merge two published fine-tunes of MiniLM and measure what the result kept of both. Needs no network.""",
    package=__name__,
    options=".cli:DemoOptions",
    run=".cli:main",
    main=".cli:main",
    terminal=("as_json", "quiet"),
    position=130,
)
