"""`basis eval`: how good a model is, alone or against another."""

from basiscli.cli.command import SHOWS, Command

command = Command(
    name="eval",
    help=("Measure perplexity, next-token accuracy, tasks, cache size and speed of a model, alone or against another."),
    package=__name__,
    options=".options:EvalOptions",
    run=".api:run",
    main=".cli:main",
    numbers=".api:numbers_of",
    terminal=("fail_if", "save_recipe", *SHOWS, "config"),
    makes="figures",
    position=60,
)
