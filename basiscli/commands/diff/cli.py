"""`basis diff`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from basiscli.cli import options
from basiscli.cli.output import Output, ProgressStyle, errors_shown

if TYPE_CHECKING:
    from basiscli.commands.diff.api import Differences


def diff(
    a: Annotated[str, typer.Argument(help="Folder, weights file, Hub id or LoRA adapter.")],
    b: Annotated[str, typer.Argument(help="What to compare it with.")],
    base: Annotated[str | None, typer.Option(help="The base of an adapter. [default: the one it names]")] = None,
    top: Annotated[int, typer.Option(help="Show this many tensors, the most different first; 0 for all.")] = 20,
    progress: options.Progress = ProgressStyle.BAR,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show how two checkpoints differ, tensor by tensor. Streams: memory does not grow with the model."""
    out = Output(as_json=json, quiet=quiet, progress=progress)
    with errors_shown(as_json=json):
        from basiscli.commands.diff.api import diff as api_diff

        found = api_diff(a, b, base=base, progress=out.progress())
        out.result(found.as_dict(), lambda: _show(out, found, top))


def _show(out: Output, found: Differences, top: int) -> None:
    changed = sorted((t for t in found.tensors if not t.equal), key=lambda t: -t.relative)
    equal = len(found.tensors) - len(changed)
    shown = changed[:top] if top else changed
    if shown:
        rows = [[t.name, f"{t.relative:.3e}", f"{t.largest:.3e}", f"{t.cosine:.6f}"] for t in shown]
        out.table(["tensor", "‖A−B‖/‖A‖", "largest |A−B|", "cosine"], rows, right=[1, 2, 3])
        if len(changed) > len(shown):
            out.line(f"… and {len(changed) - len(shown)} more (--top 0 shows all)")
        out.line()
    for name in found.only_in_a:
        out.line(f"only in A: {name}")
    for name in found.only_in_b:
        out.line(f"only in B: {name}")
    for name, shapes in found.shapes_differ.items():
        out.line(f"shapes differ: {name}: {shapes}")
    out.line(f"{len(changed)} tensors differ, {equal} are equal; ‖A−B‖/‖A‖ over all: {found.relative:.3e}")
