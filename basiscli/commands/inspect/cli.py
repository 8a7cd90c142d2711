"""Options and terminal output of `basis inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from basiscli.cli.fields import ModelName, Options, argument, option
from basiscli.cli.output import Output
from basiscli.cli.session import Session

if TYPE_CHECKING:
    from basiscli.commands.inspect.api import Inspection


class InspectOptions(Options):
    """Options of `basis inspect`."""

    model: Annotated[ModelName, argument("Folder, weights file, Hub id or LoRA adapter.")] = "."
    tensors: Annotated[bool, option("List every tensor.")] = False


def main(options: InspectOptions, session: Session) -> None:
    """Read headers and print what they say."""
    from basiscli.commands.inspect.api import inspect

    out, found = session.out, inspect(options.model)
    document = found.as_dict()
    if not options.tensors:
        del document["tensors"]
    out.result(document, lambda: _show(out, found, with_tensors=options.tensors))


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
