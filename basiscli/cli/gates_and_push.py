"""What follows a run: gates on its numbers, and a push to the Hub if all of them pass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from basiscli.cli.output import Output
from basiscli.errors import BasisError

if TYPE_CHECKING:
    from basiscli.transforms import Method


class GatesAndPush:
    """The gates and the push of one command: checked before the work as far as they can be, done after it."""

    def __init__(
        self,
        out: Output,
        *,
        fail_if: Sequence[str] | None = None,
        push_to: str | None = None,
        private: bool = False,
        create_pr: bool = False,
    ) -> None:
        """Read the gates and the target.

        Raises:
            UsageError: a gate is no condition, the target no Hub id, or `--private` and `--create-pr` stand alone.
        """
        from basiscli.gates import parse_gate

        self._out = out
        self._gates = [parse_gate(text) for text in fail_if or []]
        self._target, self._private, self._create_pr = push_to, private, create_pr
        if push_to is not None:
            from basiscli.hub.client import parse_target

            parse_target(push_to, create_pr=create_pr)
        elif private or create_pr:
            from basiscli.errors import UsageError

            raise UsageError("--private and --create-pr are about a push", remedy="add --push-to org/name")

    def before(self, known: Collection[str] | None) -> None:
        """Refuse what would fail after the work: a misspelt number, and a push by nobody.

        Args:
            known: the numbers there will be; None where only the work can tell.
        """
        for gate in self._gates if known is not None else []:
            gate.check_names(known or ())
        if self._target is not None:
            from basiscli.hub.client import check_login, parse_target

            check_login(parse_target(self._target)[0])

    def done(
        self, document: dict[str, Any], text: Callable[[], None], *, numbers: Mapping[str, float], path: Path | None
    ) -> None:
        """Show the result, with what the gates and the push came to; the output stays whatever they say.

        Args:
            document: the result for `--json`; gets `gates` and `push`.
            text: prints it for people.
            numbers: what the gates are over.
            path: what is pushed.
        """
        from basiscli.gates import failure_of

        shown = dict(document)
        try:
            outcomes = [gate.outcome(numbers) for gate in self._gates]
            if outcomes:
                shown["gates"] = [outcome.as_dict() for outcome in outcomes]
            for outcome in outcomes:
                if not outcome.failed:
                    self._out.note(f"passed: {outcome}")
            failure = failure_of(outcomes)
            if failure is not None:
                failure.remedy = f"see what became of it in {path}; nothing was pushed" if path else None
                raise failure
            if self._target is not None and path is not None:
                self._push(shown, path)
        except BasisError as error:
            raise self._out.failed(error, shown, text) from error
        self._out.result(shown, text)
        if "push" in shown and not self._out.as_json:
            self._out.line(shown["push"]["url"])

    def _push(self, shown: dict[str, Any], path: Path) -> None:
        from basiscli.cli.command import find_command

        assert self._target is not None
        push = find_command("push")
        options = push.model.of(folder=str(path), target=self._target, private=self._private, create_pr=self._create_pr)
        try:
            pushed = push.do(options, self._out.progress())
        except BasisError as error:
            error.remedy = f"{error.remedy}; the output is complete: basis push {path} {self._target}"
            raise
        note_push(self._out, pushed)
        shown["push"] = pushed.as_dict()


def note_push(out: Output, pushed: Any) -> None:
    """Say what a push (a `PushResult`) left out and took away."""
    if pushed.left_out:
        out.note(f"not pushed: {', '.join(pushed.left_out)}")
    if pushed.removed:
        out.note(f"taken away, of the model that was there: {', '.join(pushed.removed)}")
    if not pushed.checked_digests:
        out.note("there is no report with digests: only the structure was checked", warning=True)


def known_numbers(method: Method) -> set[str] | None:
    """Return the numbers that a report of this method can have; None where a method may add numbers of its own."""
    from basiscli.reports.numbers import MEANINGS

    adds = method.keeps_factors and not method.implementation.__module__.startswith("basis_plugins.")
    return None if adds else set(MEANINGS)
