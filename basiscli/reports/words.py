"""How reports write names, numbers and times for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from basiscli.reports.schema import SourceRecord

_MOST_NAMES = 8


def label(source: SourceRecord) -> str:
    """Return what a stranger may know an input by: its Hub id, or the name (not the path) of its folder."""
    return source.repo_id or Path(source.spec).name.strip(".") or source.spec


def labels(sources: Sequence[SourceRecord]) -> list[str]:
    """Return short names of inputs; folders of the same name get their parent's before it: `run-1/final`."""
    names = [label(source) for source in sources]
    longer = ["/".join(Path(source.spec).parts[-2:]) for source in sources]
    return [more if names.count(name) > 1 else name for name, more in zip(names, longer, strict=True)]


def models_of(sources: Sequence[SourceRecord]) -> str:
    """Return the models that went in, without a base, in one phrase: `org/a, b and c`."""
    return joined([label(source) for source in sources if source.role == "model"])


def joined(names: Sequence[str]) -> str:
    """Return names in one phrase: `a, b and c`; of many, the first eight and how many more there are."""
    shown = list(names[:_MOST_NAMES])
    if len(names) > _MOST_NAMES:
        shown.append(f"{len(names) - _MOST_NAMES} more")
    return ", ".join(shown[:-1]) + " and " + shown[-1] if len(shown) > 1 else "".join(shown)


def percent(share: float) -> str:
    """Return a share as a percentage: `62.5 %` of 0.625."""
    return f"{100 * share:.1f} %"


def yes_no(value: bool) -> str:
    """Return `yes` or `no`."""
    return "yes" if value else "no"


def rounded(count: float) -> str:
    """Return a count as a person reads it: `134.5 M` of 134,515,008."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return f"{count:.0f}"


def duration(seconds: float) -> str:
    """Return a time: `12.3 s`, `4 min 05 s` or `2 h 10 min`."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
