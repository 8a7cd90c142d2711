"""The calibration text of an init method that looks at activations: EVA, CorDA."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from basiscli.errors import InputError, UsageError
from basiscli.transforms import Method

DEFAULT_TOKENS, DEFAULT_LENGTH = 16384, 512


@dataclass(frozen=True)
class Calibration:
    """A text, and how much of it runs through the model."""

    place: str | None
    """Path of a file or folder; None for the built-in mix."""
    tokens: int
    """Tokens in all, at most."""
    length: int
    """Tokens a window."""

    @property
    def files(self) -> list[Path]:
        """The files that it is read from; none for the built-in mix."""
        if not self.place:
            return []
        path = Path(self.place)
        return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def calibration_for(method: Method, given: Calibration | None) -> Calibration | None:
    """Return the calibration that a method runs with: as given, or the built-in mix; None if it needs none.

    Raises:
        UsageError: the method looks at weights alone, or there are fewer tokens than one window.
        InputError: there is no such file.
    """
    if not method.needs_calibration:
        if given is not None:
            raise UsageError(f"{method.name} looks at the weights alone", remedy="leave out --calibration and --tokens")
        return None
    given = given or Calibration(None, DEFAULT_TOKENS, DEFAULT_LENGTH)
    if given.length < 1 or given.tokens < given.length:
        raise UsageError(
            f"{given.tokens} tokens in windows of {given.length}", remedy="give --tokens for one window at least"
        )
    if given.place is not None and not Path(given.place).exists():
        raise InputError("no such calibration file", file=given.place, remedy="check the path")
    return given
