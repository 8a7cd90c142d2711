"""`basis report`: what a run did."""

from basiscli.cli.command import Command

command = Command(
    name="report",
    help="""Show what a run did: as a page with pictures, as Markdown, or as named numbers.

The page is one file without scripts that loads nothing. `--json` prints the report itself, with `--numbers` the
numbers and their meanings, and with `--html` where the page is. `--numbers` alone, in a folder without a report,
lists every number that gates can be written over.""",
    package=__name__,
    options=".cli:ReportOptions",
    run=".cli:main",
    main=".cli:main",
    terminal=("as_json", "quiet"),
    position=100,
)
