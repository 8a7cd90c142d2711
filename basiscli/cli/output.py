"""Terminal output: results, tables, progress and errors. No other module prints.

A result goes to stdout, everything else to stderr. `--json` makes the result one JSON document, `--quiet` leaves only
the result. Colours and bars appear on terminals only (rich honours NO_COLOR and TERM=dumb); `--progress json` writes
lines that a program can read instead.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

import typer

from basiscli.errors import BasisError
from basiscli.names import for_json, format_size, printable

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

_OFTEN = 0.5  # seconds between two lines of progress
_BY_HUB = "upload"  # huggingface_hub draws bars of its own for it
_ISSUES = "please report it with the command and the text above at the project's issue tracker"


class ProgressStyle(StrEnum):
    """Values of `--progress`."""

    BAR = "bar"
    JSON = "json"


class Output:
    """Prints a command's result to stdout as text or JSON, and notes to stderr."""

    def __init__(self, *, as_json: bool, quiet: bool, progress: ProgressStyle = ProgressStyle.BAR) -> None:
        self.as_json, self.quiet, self.style = as_json, quiet, progress
        if quiet or progress is ProgressStyle.JSON or not sys.stderr.isatty():
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    def result(self, document: Any, text: Callable[[], None]) -> None:
        """Print a result: the document with `--json`, else by calling `text`."""
        if self.as_json:
            print(json.dumps(for_json(document), indent=2, allow_nan=False))  # noqa: T201
        else:
            text()

    def failed(self, error: BasisError, document: dict[str, Any], text: Callable[[], None]) -> typer.Exit:
        """Print a result and the error that followed it; return the exception that ends the command, to be raised."""
        self.result(document | error.as_dict(), text)
        _show(error)
        return typer.Exit(error.exit_code)

    def line(self, text: str = "") -> None:
        """Print a line of the result to stdout."""
        print(printable(text))  # noqa: T201

    def note(self, text: str, *, warning: bool = False) -> None:
        """Print a note to stderr, unless `--quiet`."""
        if not self.quiet:
            typer.secho(printable(text), err=True, fg="yellow" if warning else None)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> None:
        """Print a table of the result; `right` has the indices of right-aligned columns."""
        if not sys.stdout.isatty():  # a pipe gets plain aligned text of any width
            widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
            for row in [columns, *rows]:
                cells = (
                    c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
                )
                self.line("  ".join(cells).rstrip())
            return
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="bold")
        for number, column in enumerate(columns):
            table.add_column(column, justify="right" if number in right else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(printable, row))
        Console().print(table)

    def progress(self) -> Progress:
        """Return a progress display in the style of `--progress`."""
        if self.style is ProgressStyle.JSON:
            return Lines()
        return Bars(hidden=self.quiet or not sys.stderr.isatty())


class Progress(Protocol):
    """A progress display, as `basiscli.progress.Progress`."""

    def start(self, what: str, tasks: int, size: int, unit: str = "bytes") -> None: ...  # noqa: D102
    def advance(self, size: int) -> None: ...  # noqa: D102
    def note(self, text: str) -> None: ...  # noqa: D102
    def stop(self) -> None: ...  # noqa: D102


class Lines:
    """A progress display of JSON lines on stderr: at a pass's beginning and end, and twice a second in between."""

    def __init__(self) -> None:
        self._line: dict[str, Any] = {}
        self._began = self._shown = 0.0
        self._lock = threading.Lock()  # workers advance

    def start(self, what: str, tasks: int, size: int, unit: str = "bytes") -> None:
        """Begin a pass of `tasks` tasks with `size` bytes (or another unit) in all."""
        with self._lock:
            self._end()
            self._began = time.monotonic()
            self._line = {"phase": what, "done": 0, "total": size, "unit": unit}
            self._show()

    def advance(self, size: int) -> None:
        """Count one finished task of this size."""
        with self._lock:
            if self._line:
                self._line["done"] += size
                if time.monotonic() - self._shown >= _OFTEN:
                    self._show()

    def note(self, text: str) -> None:
        """Show a text, such as the loss, in the lines that follow."""
        with self._lock:
            if self._line:
                self._line["note"] = text

    def stop(self) -> None:
        """End the pass."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._line:
            self._show()
        self._line = {}

    def _show(self) -> None:
        self._shown = time.monotonic()
        seconds = round(self._shown - self._began, 3)
        print(json.dumps(self._line | {"seconds": seconds}), file=sys.stderr, flush=True)  # noqa: T201


class Bars:
    """A progress display of bars on stderr, one per pass: tasks, rate and time left."""

    def __init__(self, *, hidden: bool) -> None:
        self._hidden = hidden
        self._bars: RichProgress | None = None
        self._bar: Any = None

    def start(self, what: str, tasks: int, size: int, unit: str = "bytes") -> None:
        """Begin a pass of `tasks` tasks with `size` bytes (or another unit) in all."""
        if self._hidden or tasks == 0 or what == _BY_HUB:
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        if self._bars is None:
            self._bars = Progress(
                TextColumn("{task.description:>10}"),
                BarColumn(),
                TextColumn("{task.fields[amount]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._bars.start()
        self._bar = self._bars.add_task(what, total=size, done=0, tasks=tasks, unit=unit, amount="", note="")

    def advance(self, size: int) -> None:
        """Count one finished task of this size."""
        if self._bars is not None:
            bar = next(task for task in self._bars.tasks if task.id == self._bar)
            done = bar.fields["done"] + 1
            self._bars.update(self._bar, advance=size, done=done, amount=_amount(bar, done))

    def note(self, text: str) -> None:
        """Show a text, such as the loss, beside the bar."""
        if self._bars is not None:
            self._bars.update(self._bar, note=text)

    def stop(self) -> None:
        """End the display."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


def _amount(bar: Any, done: int) -> str:
    """Return pieces done of all, and the rate."""
    count = f"{done}/{bar.fields['tasks']}"
    if bar.fields["unit"] == "bytes":
        return f"{count} tensors, {format_size(int(bar.completed))}, {format_size(int(bar.speed or 0))}/s"
    return f"{count}, {bar.speed or 0:.1f} {bar.fields['unit']}/s"


def _show(error: BasisError) -> None:
    typer.secho(printable(f"error: {error}"), err=True, fg="red")


@contextmanager
def errors_shown(*, as_json: bool) -> Iterator[None]:
    """Print errors of the block and exit with their code (`typer.Exit`); others are bugs: traceback and code 1."""
    try:
        yield
    except BasisError as error:
        if as_json:
            print(json.dumps(error.as_dict(), indent=2))  # noqa: T201
        _show(error)
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt:
        typer.secho("interrupted: the same command goes on where this one stopped", err=True)
        raise typer.Exit(130) from None
    except BrokenPipeError:
        # The reader of a pipe went away, as `head` does; nothing is left to say. Keep the interpreter from trying.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
    except typer.Exit:
        raise
    except Exception as error:
        traceback.print_exc()
        typer.secho(f"this is a bug in basis (or a plugin): {_ISSUES}", err=True, fg="red")
        raise typer.Exit(1) from error
