"""Which function gives a command's part of its reports."""

from __future__ import annotations

from basiscli.cli.command import command_points, load_command
from basiscli.errors import UsageError
from basiscli.reports.contribution import Contribution, Contributor
from basiscli.reports.schema import Report


def contributor_of(report: Report) -> Contributor:
    """Return the function that gives the part of the command that wrote this report, as its declaration says.

    A report of a command that is not installed, or that adds nothing, has the sections that all reports have.
    """
    try:
        command = load_command(command_points()[report.command]).chosen({"method": report.method.name})
    except (KeyError, UsageError):
        return lambda report, evaluations: Contribution()
    if command.page is None:
        return lambda report, evaluations: Contribution()
    found: Contributor = command.load(command.page)
    return found
