"""`basis inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from basiscli.cli import options
from basiscli.cli.output import Output, errors_shown

if TYPE_CHECKING:
    from basiscli.commands.inspect.api import Inspection


def inspect(
    model: Annotated[str, typer.Argument(help="Folder, weights file, Hub id or LoRA adapter.")] = ".",
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    json: options.Json = False,
) -> None:
    """Show what is in a checkpoint or adapter, from its headers: no weights are read, and none fetched from the Hub."""
    out = Output(as_json=json, quiet=False)
    with errors_shown(as_json=json):
        from basiscli.commands.inspect.api import inspect as api_inspect

        found = api_inspect(model)
        document = found.as_dict()
        if not tensors:
            del document["tensors"]
        out.result(document, lambda: _show(out, found, with_tensors=tensors))


def _show(out: Output, found: Inspection, *, with_tensors: bool) -> None:
    from basiscli.names import format_size

    out.line(f"{found.kind} {found.path}" + (f" ({found.repo_id}@{found.revision})" if found.repo_id else ""))
    out.table(["", ""], [[name, str(value)] for name, value in found.facts.items()])
    out.line()
    out.table(
        ["kind", "tensors", "parameters", "size", "dtypes"],
        [
            [g.kind, str(g.tensors), f"{g.parameters:,}", format_size(g.nbytes), ", ".join(g.dtypes)]
            for g in [*found.groups, found.total]
        ],
        right=[1, 2, 3],
    )
    if with_tensors:
        out.line()
        rows = [[t.name, t.dtype, "×".join(map(str, t.shape)), format_size(t.nbytes)] for t in found.tensors]
        out.table(["tensor", "dtype", "shape", "size"], rows, right=[3])
