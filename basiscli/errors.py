"""Exceptions of basis, each with a message, the file and tensor concerned, and a remedy.

    BasisError            1  a bug in basis, or a plugin's
    ├── UsageError        2  the command or its parameters
    ├── InputError        3  a file or model that is corrupt, incompatible or missing
    ├── GateFailed        4  a `--fail-if` that came true
    ├── HubError          5  the network or the Hub
    └── ResourceError     6  memory or disk

The number is the exit code of the command line.
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterable


class BasisError(Exception):
    """Base of all errors: `what` is wrong, in which `file` and `tensor`, and the `remedy`."""

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        what: str,
        *,
        file: Path | str | None = None,
        tensor: str | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.file = None if file is None else str(file)
        self.tensor = tensor
        self.remedy = remedy

    def __str__(self) -> str:
        lines = [self.what]
        lines += [f"  file: {self.file}"] if self.file else []
        lines += [f"  tensor: {self.tensor}"] if self.tensor else []
        lines += [f"  to do: {self.remedy}"] if self.remedy else []
        return "\n".join(lines)

    def as_dict(self) -> dict[str, str | int | None]:
        """Return the error as plain data, for `--json`."""
        return {
            "error": type(self).__name__,
            "what": self.what,
            "file": self.file,
            "tensor": self.tensor,
            "remedy": self.remedy,
            "exit_code": self.exit_code,
        }


class UsageError(BasisError):
    """The command line, a recipe or a parameter is wrong."""

    exit_code = 2


class InputError(BasisError):
    """A model, adapter or file is corrupt, incompatible or missing."""

    exit_code = 3


class GateFailed(BasisError):
    """A condition of `--fail-if` is true of the report's numbers."""

    exit_code = 4


class HubError(BasisError):
    """The Hub refused a request, or the network failed."""

    exit_code = 5


class ResourceError(BasisError):
    """Memory or disk ran out, or would."""

    exit_code = 6


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "did you mean 'x'? (known: …)" for a misspelt word; without a close match, only the known words."""
    names = sorted(known)
    close = get_close_matches(word, names, n=1)
    listing = f"known: {', '.join(names)}" if names else "none is known"
    return f"did you mean '{close[0]}'? ({listing})" if close else listing
