"""Options and terminal output of `basis diff`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from basiscli.cli.fields import ModelName, Options, argument, option
from basiscli.cli.output import Output
from basiscli.cli.session import Session

if TYPE_CHECKING:
    from basiscli.commands.diff.api import Differences


class DiffOptions(Options):
    """Options of `basis diff`."""

    a: Annotated[ModelName, argument("Folder, weights file, Hub id or LoRA adapter.")]
    b: Annotated[ModelName, argument("What to compare it with.")]
    base: Annotated[ModelName | None, option("The base of an adapter. [default: the one it names]")] = None
    top: Annotated[int, option("Show this many tensors, the most different first; 0 for all.")] = 20


def main(options: DiffOptions, session: Session) -> None:
    """Compare two checkpoints and print how they differ."""
    from basiscli.commands.diff.api import diff

    out, found = session.out, diff(options.a, options.b, base=options.base, progress=session.progress())
    out.result(found.as_dict(), lambda: _show(out, found, options.top))


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
    if found.relative is None:
        out.line("nothing was compared: no tensor has the same name and shape in both")
        return
    out.line(f"{len(changed)} tensors differ, {equal} are equal; ‖A−B‖/‖A‖ over all: {found.relative:.3e}")
