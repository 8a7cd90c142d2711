"""A smaller KV cache: what `basis compress --kv-ratio` does."""

from basiscli.cli.command import MAKES_MODEL, Command

command = Command(
    name="compress",
    help="Make a model's KV cache smaller by trained orthogonal projections.",
    package=__name__,
    options=".options:KVOptions",
    plan=".api:plan",
    run=".api:run_compress",
    view=".cli:KVView",
    page=".page:contribute",
    terminal=MAKES_MODEL,
    makes="model",
)
