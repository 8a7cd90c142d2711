"""Which function gives a command's part of its reports; its file is loaded when a report is shown."""

from __future__ import annotations

from importlib import import_module

from basiscli.reports.contribution import Contributor
from basiscli.reports.schema import Report

CONTRIBUTORS: dict[str, str] = {
    "merge": "basiscli.commands.merge.page:contribute",
    "init": "basiscli.commands.init.page:contribute",
    "extract": "basiscli.commands.init.page:contribute",
    "compress": "basiscli.commands.kv.page:contribute",
    "compress an adapter": "basiscli.commands.nola.page:contribute",
}
"""By the command that a report names, `module:function`; `compress` makes two kinds of things."""


def contributor_of(report: Report) -> Contributor:
    """Return the function that gives the part of the command that wrote this report."""
    of_adapter = report.command == "compress" and report.adapter is not None
    module, _, function = CONTRIBUTORS["compress an adapter" if of_adapter else report.command].partition(":")
    found: Contributor = getattr(import_module(module), function)
    return found
