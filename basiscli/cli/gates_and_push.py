"""`--fail-if` and `--push-to`: gates on a run's numbers, and a push to the Hub if all of them pass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from basiscli.cli.output import Output
from basiscli.errors import BasisError

if TYPE_CHECKING:
    from basiscli.transforms import Method


class GatesAndPush:
    """The gates and the push of one run: `before` checks them, `done` evaluates the gates and pushes."""

    def __init__(
        self,
        out: Output,
        *,
        fail_if: Sequence[str] | None = None,
        push_to: str | None = None,
        private: bool = False,
        create_pr: bool = False,
    ) -> None:
        """Parse the gates and the push target.

        Raises:
            UsageError: a gate is not a condition, the target is not a Hub id, or `--private` or `--create-pr` has none.
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
        """Raise before the run for what would fail after it: an unknown number in a gate, a push without login.

        Args:
            known: names of the numbers that the run will have; None if they depend on the data.

        Raises:
            UsageError: a gate names another number.
            HubError: the Hub does not accept the token.
        """
        for gate in self._gates if known is not None else []:
            gate.check_names(known or ())
        if self._target is not None:
            from basiscli.hub.client import check_login, parse_target

            check_login(parse_target(self._target)[0])

    def done(
        self, document: dict[str, Any], text: Callable[[], None], *, numbers: Mapping[str, float], path: Path | None
    ) -> None:
        """Evaluate the gates, push if all pass, and show the result; the output stays even if they fail.

        Args:
            document: the result for `--json`; `gates` and `push` are added to a copy.
            text: prints the result for people.
            numbers: of the report, by name.
            path: the folder to push.

        Raises:
            typer.Exit: a gate or the push failed; the error is shown.
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
    """Print notes on a `PushResult`: files not pushed, files deleted, no digests to check."""
    if pushed.left_out:
        out.note(f"not pushed: {', '.join(pushed.left_out)}")
    if pushed.removed:
        out.note(f"taken away, of the model that was there: {', '.join(pushed.removed)}")
    if not pushed.checked_digests:
        out.note("there is no report with digests: only the structure was checked", warning=True)


def known_numbers(method: Method) -> set[str] | None:
    """Return the names of a method's numbers in a report; None for a plugin's method that may add its own."""
    from basiscli.reports.numbers import MEANINGS

    adds = method.keeps_factors and not method.implementation.__module__.startswith("basis_plugins.")
    return None if adds else set(MEANINGS)
