"""`basis run`: a recipe, ours or mergekit's."""

from basiscli.cli.command import SHOWS, Command

command = Command(
    name="run",
    help="""Run a recipe: merge, init, compress, extract, expand, eval and push, each on what the steps before it made.

Steps that are done are not done again while nothing they depend on changes. mergekit's recipes are read as they
are. The options about how a merge runs are for those; a step's options are in its recipe.""",
    package=__name__,
    options=".options:RunOptions",
    run=".api:do",
    main=".cli:main",
    terminal=("dry_run", "fail_if", "push_to", "private", "create_pr", *SHOWS),
    position=70,
)
