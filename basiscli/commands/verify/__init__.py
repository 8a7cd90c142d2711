"""`basis verify`: whether a checkpoint is whole."""

from basiscli.cli.command import SHOWS, Command

command = Command(
    name="verify",
    help=(
        "Check a checkpoint: structure of every file, and digests against its report. Exit code 3 if anything is wrong."
    ),
    package=__name__,
    options=".cli:VerifyOptions",
    run=".cli:main",
    main=".cli:main",
    terminal=SHOWS,
    position=110,
)
