"""`basis methods`: what is installed."""

from basiscli.cli.command import Command

command = Command(
    name="methods",
    help="""List the installed methods, or show one.""",
    package=__name__,
    options="basiscli.cli.options:Plugins",
    run=None,
    group=".cli:group",
    position=140,
)
