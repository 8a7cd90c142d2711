"""Finding the function that returns a command's own parts of its reports."""

from __future__ import annotations

from basiscli.cli.command import command_points, load_command
from basiscli.errors import UsageError
from basiscli.reports.contribution import Contribution, Contributor
from basiscli.reports.schema import Report


def contributor_of(report: Report) -> Contributor:
    """Return the `Contributor` of the command that wrote this report, from its declaration (`Command.page`).

    For a command that is not installed or has none, it returns an empty contribution.
    """
    try:
        command = load_command(command_points()[report.command]).chosen({"method": report.method.name})
    except (KeyError, UsageError):
        return lambda report, evaluations: Contribution()
    if command.page is None:
        return lambda report, evaluations: Contribution()
    found: Contributor = command.load(command.page)
    return found
