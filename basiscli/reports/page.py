"""From a report to its sections: the same ones, in the same order, for every command; empty ones are left out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from basiscli.names import format_size
from basiscli.reports.blocks import Block, Code, Notes, Section, Table, Text, Tiles, table_of
from basiscli.reports.contribution import Contribution, Contributor
from basiscli.reports.evaluations import EvaluationRecord
from basiscli.reports.numbers import named
from basiscli.reports.schema import Report, SourceRecord
from basiscli.reports.words import duration, labels, models_of, percent, rounded

_MOST_TENSORS = 5000


def sections(
    report: Report,
    contribute: Contributor,
    evaluations: Sequence[EvaluationRecord] = (),
    *,
    cost: bool = True,
) -> list[Section]:
    """Return the sections of a report that have content, in the order in which they are read.

    Args:
        report: of a run.
        contribute: gives what the command that ran says beside what all reports say.
        evaluations: of the result, and of the same model at other ratios.
        cost: whether time and memory are told, which differ from run to run.
    """
    own = contribute(report, evaluations)
    found = [
        Section("summary", "Summary", _summary(report, own, cost=cost)),
        Section("inputs", "What went in", _inputs(report, own)),
        Section("method", "What was done", _method(report, own)),
        Section("evaluation", "Before and after", (*_evaluation(evaluations), *own.comparison)),
        *own.sections,
        Section("cost", "Cost", _cost(report) if cost else ()),
        Section("numbers", "Named numbers", _numbers(report, evaluations)),
        Section("tensors", "Tensors", _tensors(report)),
        Section("versions", "Versions and digests", _versions(report)),
    ]
    return [section for section in found if section.blocks]


def _summary(report: Report, own: Contribution, *, cost: bool) -> tuple[Block, ...]:
    numbers = report.numbers
    tiles = list(own.tiles)
    tiles += [("parameters", rounded(numbers["parameters"]))] if "parameters" in numbers else []
    tiles += [("tensors", f"{numbers['tensors']:,.0f}")] if "tensors" in numbers else []
    tiles += _cost_tiles(report) if cost else []
    plain = (
        f"{models_of(report.sources)} went through {report.command} by {report.method.name}: "
        f"{numbers.get('tensors', 0):,.0f} tensors."
    )
    notes = (Notes(tuple(report.notes)),) if report.notes else ()
    return (Text(own.summary or plain), Tiles(tuple(tiles)), *notes)


def _cost_tiles(report: Report) -> tuple[tuple[str, str], ...]:
    cost = report.cost
    return ("time", duration(cost.seconds)), ("peak memory", format_size(cost.peak_memory_bytes))


def _inputs(report: Report, own: Contribution) -> tuple[Block, ...]:
    columns = ["role", "input", "kind", "revision", "licence", "weight", "digest"]
    rows = [
        [s.role, name, s.kind, s.revision or "", s.license or "", _weight(s), (s.digest or "")[:16]]
        for s, name in zip(report.sources, labels(report.sources), strict=True)
    ]
    found: list[Block] = [table_of("Models that went in", columns, rows, code={1, 3, 6}, right={5})]
    if own.calibration is not None:
        row = [own.calibration.name, f"{own.calibration.tokens:,}", own.calibration.sha256[:16]]
        found.append(
            table_of("Calibration text", ["text", "tokens", "digest of the ids"], [row], code={0, 2}, right={1})
        )
    return tuple(found)


def _method(report: Report, own: Contribution) -> tuple[Block, ...]:
    source = f" Source: {report.method.source}." if report.method.source else ""
    found: list[Block] = [Text(f"Method {report.method.name} of basis {report.command}, seed {report.seed}.{source}")]
    settings = [[name, str(value)] for name, value in report.method.parameters.items()]
    settings += [[name, value] for name, value in own.settings]
    if settings:
        found.append(table_of("Parameters", ["parameter", "value"], settings, code={0, 1}))
    return (*found, Code(report.reproduce)) if report.reproduce else tuple(found)


def _evaluation(evaluations: Sequence[EvaluationRecord]) -> list[Table]:
    """Return a table for each text that models were measured on, what came before first."""
    groups: dict[tuple[str, int, str], list[EvaluationRecord]] = {}
    for one in evaluations:
        against = one.against.model if one.against else ""
        groups.setdefault((one.text, one.tokens, against), []).append(one)
    return [_comparison(f"{tokens:,} tokens of {text}", group) for (text, tokens, _), group in groups.items()]


def _comparison(caption: str, group: Sequence[EvaluationRecord]) -> Table:
    before = group[0].against
    models = [*([before] if before else []), *(one.model for one in group)]
    rows = [
        ["perplexity", *(f"{m.perplexity:.3f}" for m in models)],
        ["next-token accuracy", *(percent(m.accuracy) for m in models)],
        ["cache, bytes a token", *(f"{m.cache_bytes_per_token:,.0f}" for m in models)],
    ]
    for context in sorted({context for m in models for context in m.decode_tokens_per_second}):
        speeds = [m.decode_tokens_per_second.get(context) for m in models]
        rows.append([f"decode after {context:,}, tokens/s", *("" if x is None else f"{x:.2f}" for x in speeds)])
    if before:
        rows.append(["KL divergence, nats a token", "", *(f"{one.numbers['kl']:.4f}" for one in group)])
        rows.append(["same next token", "", *(percent(one.numbers["agreement"]) for one in group)])
    columns = ["", *(Path(m.model).name or m.model for m in models)]
    return table_of(caption, columns, rows, right=set(range(1, len(columns))))


def _cost(report: Report) -> tuple[Block, ...]:
    cost = report.cost
    rows = [
        ["time", duration(cost.seconds)],
        *([["of it merging", duration(cost.seconds_merging)]] if cost.seconds_merging is not None else []),
        *([f"of it {part}", duration(value)] for part, value in (cost.seconds_of or {}).items()),
        ["peak memory of the process", format_size(cost.peak_memory_bytes)],
        ["read", format_size(cost.read_bytes)],
        ["written", format_size(cost.written_bytes)],
        ["workers, device", f"{cost.workers}, {cost.device}"],
        *([["steps an interrupted run had done", str(cost.resumed_steps)]] if cost.resumed_steps else []),
    ]
    return (table_of("Time, memory and bytes", ["", ""], rows, right={1}),)


def _numbers(report: Report, evaluations: Sequence[EvaluationRecord]) -> tuple[Block, ...]:
    tables = [report.numbers, *(one.numbers for one in evaluations[:1])]
    rows = [[one.name, f"{one.value:.10g}", one.meaning] for one in named(*tables)]
    if not rows:
        return ()
    return (
        Text("What the conditions of --fail-if are written over."),
        table_of("Named numbers", ["name", "value", "meaning"], rows, code={0}, right={1}, folded=True),
    )


def _tensors(report: Report) -> tuple[Block, ...]:
    normed = any(tensor.merged_norm is not None for tensor in report.tensors)
    rows = [
        [
            tensor.name, tensor.kind, tensor.dtype, "×".join(map(str, tensor.shape)) or "scalar", tensor.action,
            *([("" if tensor.merged_norm is None else f"{tensor.merged_norm:.4g}")] if normed else []),
            tensor.sha256[:16],
        ]
        for tensor in report.tensors[:_MOST_TENSORS]
    ]  # fmt: skip
    if not rows:
        return ()
    columns = ["name", "kind", "dtype", "shape", "action", *(["change"] if normed else []), "sha256"]
    last = len(columns) - 1
    table = table_of(
        f"{len(report.tensors):,} tensors", columns, rows, code={0, last}, right={5} if normed else set(), folded=True
    )
    more = len(report.tensors) - len(rows)
    return (table, *([Text(f"{more:,} more are in basis_report.json.")] if more else []))


def _versions(report: Report) -> tuple[Block, ...]:
    rows = [[name, version] for name, version in report.versions.items()]
    rows += [["kinds of tensors found by", report.kinds_found_by], ["digest of the weights", report.weights_digest]]
    return (table_of("What computed it", ["", ""], rows, code={1}),)


def _weight(source: SourceRecord) -> str:
    return "" if source.weight in (None, 1.0) else f"{source.weight:g}"
