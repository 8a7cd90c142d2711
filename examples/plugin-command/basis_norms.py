"""A command of one's own: `basis norms MODEL` prints the largest Frobenius norms of a checkpoint's tensors."""

from __future__ import annotations

from typing import Annotated

from basiscli.cli.command import Command
from basiscli.cli.fields import ModelName, Options, argument, option
from basiscli.cli.session import Session


class NormsOptions(Options):
    """Options of `basis norms`."""

    model: Annotated[ModelName, argument("Folder, weights file or Hub id.")] = "."
    top: Annotated[int, option("Show this many tensors.", "-n")] = 5


def norms(options: NormsOptions, session: Session) -> None:
    """Read one tensor after another and print the largest norms."""
    from basiscli.checkpoints.views import Checkpoint
    from basiscli.hub.resolve import resolve

    checkpoint = Checkpoint.open(resolve(options.model))
    found = {name: float(checkpoint.read(name).double().norm()) for name in checkpoint.tensors}
    largest = dict(sorted(found.items(), key=lambda item: -item[1])[: options.top])
    rows = [[name, f"{norm:.4f}"] for name, norm in largest.items()]
    session.out.result(largest, lambda: session.out.table(["tensor", "norm"], rows, right=[1]))


command = Command("norms", "Print the largest norms of a checkpoint.", __name__, options=NormsOptions, main=norms)
