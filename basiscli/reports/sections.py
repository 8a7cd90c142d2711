"""From a report to its sections: the same ones, in the same order, for every transform; empty ones are left out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from basiscli.names import format_size
from basiscli.reports.blocks import Block, Code, Notes, Section, Table, Text, Tiles
from basiscli.reports.evaluations import EvaluationRecord
from basiscli.reports.figures import cosine_matrix, layer_figures, loss_curve, ratio_curve, spectra
from basiscli.reports.numbers import named
from basiscli.reports.schema import Report, SourceRecord

_MOST_TENSORS = 5000


def sections(report: Report, evaluations: Sequence[EvaluationRecord] = (), *, cost: bool = True) -> list[Section]:
    """Return the sections that have content.

    Args:
        report: of a run.
        evaluations: of its result, and of the same model at other ratios.
        cost: whether time and memory are told, which differ from run to run.
    """
    found = [
        Section(
            "summary",
            "Summary",
            (Text(summary(report)), Tiles((*_tiles(report), *(_cost_tiles(report) if cost else ()))), *_notes(report)),
        ),
        Section("inputs", "What went in", _inputs(report)),
        Section("method", "What was done", _method(report)),
        Section("evaluation", "Before and after", _evaluation(report, evaluations)),
        Section("task-vectors", "Task vectors", _task_vectors(report)),
        Section("layers", "Layer by layer", tuple(layer_figures(report))),
        Section("spectra", "Spectra", tuple(spectra(report))),
        Section("training", "Training", tuple(loss_curve(report))),
        Section("engines", "What uses it", _engines(report)),
        Section("cost", "Cost", _cost(report) if cost else ()),
        Section("numbers", "Named numbers", _numbers(report, evaluations)),
        Section("tensors", "Tensors", _tensors(report)),
        Section("versions", "Versions and digests", _versions(report)),
    ]
    return [section for section in found if section.blocks]


def summary(report: Report) -> str:
    """Return in a sentence or two what was done."""
    names = {role: [label(s) for s in report.sources if s.role == role] for role in ("base", "model", "onto")}
    models, method = names["model"], report.method.name
    if report.command == "merge":
        more = f", added to {names['onto'][0]}" if names["onto"] else ""
        base = f" on the base {names['base'][0]}" if names["base"] else ""
        count = "One model was" if len(models) == 1 else f"{len(models)} models were"
        return f"{count} merged by {method}{base}{more}: {_joined(models)}."
    if report.kv is not None:
        kv = report.kv
        dims = f"{kv.kept * kv.head_dim:.1f} of {kv.head_dim} dimensions a head on average"
        trained = f"trained for {kv.trained_steps} steps" if kv.trained_steps else "not trained"
        return (
            f"The KV cache of {_joined(models)} keeps {_share(kv.kept)} of its bytes (removed {_share(1 - kv.kept)}): "
            f"{dims}. Method: {method}, its bases {trained}."
        )
    if report.adapter is not None:
        numbers = report.numbers
        least, most = numbers.get("rank_least", report.adapter.rank), numbers.get("rank_most", report.adapter.rank)
        if report.command == "compress":
            return (
                f"The adapter {_joined(models)} became {numbers['adapter_parameters']:,.0f} coefficients in "
                f"{numbers['modules']:,.0f} modules by {method}: {_share(numbers['fidelity'])} of its effect survives."
            )
        ranks = f"of rank {most:.0f}" if least == most else f"of ranks {least:.0f} to {most:.0f}"
        origin = (
            f"the difference of {_joined(models)} and {_joined(names['base'])}"
            if report.command == "extract"
            else _joined(models)
        )
        return (
            f"An adapter {ranks} for {numbers['modules']:,.0f} modules was made from {origin} by {method}: "
            f"{numbers['adapter_parameters']:,.0f} parameters to train."
        )
    return (
        f"{_joined(models)} went through {report.command} by {method}: {report.numbers.get('tensors', 0):,.0f} tensors."
    )


def label(source: SourceRecord) -> str:
    """Return what a stranger may know an input by: its Hub id, or the name (not the path) of its folder."""
    return source.repo_id or Path(source.spec).name.strip(".") or source.spec


def labels(sources: Sequence[SourceRecord]) -> list[str]:
    """Return short names of inputs; folders of the same name get their parent's before it."""
    names = [label(source) for source in sources]
    longer = ["/".join(Path(source.spec).parts[-2:]) for source in sources]
    return [more if names.count(name) > 1 else name for name, more in zip(names, longer, strict=True)]


def _tiles(report: Report) -> tuple[tuple[str, str], ...]:
    numbers, found = report.numbers, []
    if report.task_vectors is not None:
        found += [("norm of the merged task vector", f"{report.task_vectors.merged_norm:.4g}")]
        found += [("λ", f"{numbers['lambda']:.4g}")] if "lambda" in numbers else []
    if report.kv is not None:
        found += [("of the cache kept", _share(report.kv.kept))]
        found += [("cache bytes a token", f"{report.kv.dense_bytes_per_token:,} → {report.kv.bytes_per_token:,}")]
    if report.adapter is not None:
        found += [("parameters to train", f"{numbers['adapter_parameters']:,.0f}")]
        shown = ("effect that survives", "fidelity") if "fidelity" in numbers else ("energy held", "energy")
        found += [(shown[0], _share(numbers[shown[1]]))]
    if "parameters" in numbers:
        found += [("parameters", _count(numbers["parameters"]))]
    found += [("tensors", f"{numbers['tensors']:,.0f}")] if "tensors" in numbers else []
    return tuple(found)


def _cost_tiles(report: Report) -> tuple[tuple[str, str], ...]:
    cost = report.cost
    return ("time", _seconds(cost.seconds)), ("peak memory", format_size(cost.peak_memory_bytes))


def _notes(report: Report) -> tuple[Block, ...]:
    return (Notes(tuple(report.notes)),) if report.notes else ()


def _inputs(report: Report) -> tuple[Block, ...]:
    columns = ["role", "input", "kind", "revision", "licence", "weight", "digest"]
    rows = [
        [s.role, name, s.kind, s.revision or "", s.license or "", _weight(s), (s.digest or "")[:16]]
        for s, name in zip(report.sources, labels(report.sources), strict=True)
    ]
    found: list[Block] = [_table("Models that went in", columns, rows, code={1, 3, 6}, right={5})]
    calibration = next((one.calibration for one in (report.kv, report.adapter) if one is not None), None)
    if calibration is not None:
        row = [calibration.name, f"{calibration.tokens:,}", calibration.sha256[:16]]
        found.append(_table("Calibration text", ["text", "tokens", "digest of the ids"], [row], code={0, 2}, right={1}))
    return tuple(found)


def _method(report: Report) -> tuple[Block, ...]:
    source = f" Source: {report.method.source}." if report.method.source else ""
    found: list[Block] = [Text(f"Method {report.method.name} of basis {report.command}, seed {report.seed}.{source}")]
    settings = [[name, str(value)] for name, value in report.method.parameters.items()]
    if report.kv is not None:
        settings += [["search", report.kv.search], ["values folded", "yes" if report.kv.values_folded else "no"]]
        settings += [["training steps", str(report.kv.trained_steps)], ["tokens", f"{report.kv.trained_tokens:,}"]]
    if report.adapter is not None:
        adapter = report.adapter
        settings += [["rank", str(adapter.rank)], ["alpha", f"{adapter.alpha:g}"]]
        settings += [["rsLoRA", "yes" if adapter.rslora else "no"], ["trained", adapter.trains]]
        settings += [["quantised base", adapter.quantize]] if adapter.quantize else []
    if settings:
        found.append(_table("Parameters", ["parameter", "value"], settings, code={0, 1}))
    return (*found, Code(report.reproduce)) if report.reproduce else tuple(found)


def _evaluation(report: Report, evaluations: Sequence[EvaluationRecord]) -> tuple[Block, ...]:
    """Return a table for each text that models were measured on, what came before first."""
    groups: dict[tuple[str, int, str], list[EvaluationRecord]] = {}
    for one in evaluations:
        against = one.against.model if one.against else ""
        groups.setdefault((one.text, one.tokens, against), []).append(one)
    tables = [_comparison(f"{tokens:,} tokens of {text}", group) for (text, tokens, _), group in groups.items()]
    return (*tables, *ratio_curve(report, evaluations))


def _comparison(caption: str, group: Sequence[EvaluationRecord]) -> Table:
    before = group[0].against
    models = [*([before] if before else []), *(one.model for one in group)]
    rows = [
        ["perplexity", *(f"{m.perplexity:.3f}" for m in models)],
        ["next-token accuracy", *(_share(m.accuracy) for m in models)],
        ["cache, bytes a token", *(f"{m.cache_bytes_per_token:,.0f}" for m in models)],
    ]
    for context in sorted({context for m in models for context in m.decode_tokens_per_second}):
        speeds = [m.decode_tokens_per_second.get(context) for m in models]
        rows.append([f"decode after {context:,}, tokens/s", *("" if x is None else f"{x:.2f}" for x in speeds)])
    if before:
        rows.append(["KL divergence, nats a token", "", *(f"{one.numbers['kl']:.4f}" for one in group)])
        rows.append(["same next token", "", *(_share(one.numbers["agreement"]) for one in group)])
    columns = ["", *(Path(m.model).name or m.model for m in models)]
    return _table(caption, columns, rows, right=set(range(1, len(columns))))


def _task_vectors(report: Report) -> tuple[Block, ...]:
    if report.task_vectors is None:
        return ()
    models = [source for source in report.sources if source.role != "base"]
    names, vectors = labels(models), report.task_vectors
    rows = [[name, f"{norm:.4g}"] for name, norm in zip(names, vectors.norms, strict=False)]
    rows.append(["merged", f"{vectors.merged_norm:.4g}"])
    table = _table("Frobenius norms over the whole model", ["task vector", "norm"], rows, code={0}, right={1})
    return (table, *cosine_matrix(names, vectors.cosines))


def _engines(report: Report) -> tuple[Block, ...]:
    if report.kv is None:
        return ()
    rows = [[engine, use] for engine, use in report.kv.engines.items()]
    return (_table("Engines", ["engine", "what it uses of this folder"], rows),)


def _cost(report: Report) -> tuple[Block, ...]:
    cost = report.cost
    rows = [
        ["time", _seconds(cost.seconds)],
        *([["of it merging", _seconds(cost.seconds_merging)]] if cost.seconds_merging is not None else []),
        *([f"of it {part}", _seconds(value)] for part, value in (cost.seconds_of or {}).items()),
        ["peak memory of the process", format_size(cost.peak_memory_bytes)],
        ["read", format_size(cost.read_bytes)],
        ["written", format_size(cost.written_bytes)],
        ["workers, device", f"{cost.workers}, {cost.device}"],
        *([["steps an interrupted run had done", str(cost.resumed_steps)]] if cost.resumed_steps else []),
    ]
    return (_table("Time, memory and bytes", ["", ""], rows, right={1}),)


def _numbers(report: Report, evaluations: Sequence[EvaluationRecord]) -> tuple[Block, ...]:
    tables = [report.numbers, *(one.numbers for one in evaluations[:1])]
    rows = [[one.name, f"{one.value:.10g}", one.meaning] for one in named(*tables)]
    if not rows:
        return ()
    return (
        Text("What the conditions of --fail-if are written over."),
        _table("Named numbers", ["name", "value", "meaning"], rows, code={0}, right={1}, folded=True),
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
    table = _table(
        f"{len(report.tensors):,} tensors", columns, rows, code={0, last}, right={5} if normed else set(), folded=True
    )
    more = len(report.tensors) - len(rows)
    return (table, *([Text(f"{more:,} more are in basis_report.json.")] if more else []))


def _versions(report: Report) -> tuple[Block, ...]:
    rows = [[name, version] for name, version in report.versions.items()]
    rows += [["kinds of tensors found by", report.kinds_found_by], ["digest of the weights", report.weights_digest]]
    return (_table("What computed it", ["", ""], rows, code={1}),)


def _table(
    caption: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: set[int] | None = None,
    code: set[int] | None = None,
    folded: bool = False,
) -> Table:
    """Return a table without the columns that are empty in every row."""
    kept = [n for n in range(len(columns)) if n == 0 or any(row[n] for row in rows)]
    numbers, names = (frozenset(kept.index(n) for n in which or () if n in kept) for which in (right, code))
    return Table(
        tuple(columns[n] for n in kept),
        tuple(tuple(row[n] for n in kept) for row in rows),
        caption,
        numbers,
        names,
        folded,
    )


def _joined(names: Sequence[str]) -> str:
    shown = list(names[:8]) + ([f"{len(names) - 8} more"] if len(names) > 8 else [])
    return ", ".join(shown[:-1]) + " and " + shown[-1] if len(shown) > 1 else "".join(shown)


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _weight(source: SourceRecord) -> str:
    return "" if source.weight in (None, 1.0) else f"{source.weight:g}"


def _count(value: float) -> str:
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}"


def _seconds(value: float) -> str:
    if value < 120:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
