"""Options and terminal output of `basis verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from basiscli.cli.fields import ModelName, Options, argument
from basiscli.cli.output import Output
from basiscli.cli.session import Session

if TYPE_CHECKING:
    from basiscli.commands.verify.api import Verification


class VerifyOptions(Options):
    """Options of `basis verify`."""

    folder: Annotated[ModelName, argument("A checkpoint or adapter, or both as `init` made them.")] = "."


def main(options: VerifyOptions, session: Session) -> None:
    """Check a checkpoint and print that it is whole."""
    from basiscli.commands.verify.api import verify

    out, found = session.out, verify(options.folder, progress=session.progress())
    out.result(found.as_dict(), lambda: _show(out, found))


def _show(out: Output, found: Verification) -> None:
    if found.checked_digests:
        out.line(f"ok: {found.tensors} tensors, every digest as {found.report} says")
    else:
        out.line(
            f"ok: {found.tensors} tensors, structure only: there is no {found.report} with digests to check against"
        )
