"""Benchmark scores as tables and as a picture: full model, found strategy, uniform reduction."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dop_search.app.record import EvalRecord, Record, RelativeMean, ScoreComparison, SuiteInfo
from dop_search.app.report.style import FAINT, FOUND, UNIFORM, styled
from dop_search.app.report.table import plain_table
from dop_search.app.report.text import NONE, percent_text

SCORE_NOTES = (
    "95 % CI: of found minus full in the benchmark's unit, by a bootstrap over samples that pairs the two.",
    "mean: of the per cent of the full model's score that is left, over the benchmarks.",
)


def score_text(value: float | None) -> str:
    """A score in its unit, e.g. ``61.9`` or ``1522.3``."""
    return NONE if value is None else f"{value:.1f}"


def change_text(interval: tuple[float, float] | None) -> str:
    """The interval of a difference, e.g. ``-2.0…+0.4``."""
    return NONE if interval is None else f"{interval[0]:+.1f}…{interval[1]:+.1f}"


def score_rows(scores: Mapping[str, ScoreComparison], mean: RelativeMean | None) -> list[tuple[str, ...]]:
    """Benchmark, full, found, interval of the difference, uniform, per cent kept by found and by uniform."""
    rows: list[tuple[str, ...]] = [
        (
            _with_unit(name, item.unit),
            score_text(item.full),
            score_text(item.pruned),
            change_text(item.ci95),
            score_text(item.uniform),
            score_text(item.relative_pruned),
            score_text(item.relative_uniform),
        )
        for name, item in scores.items()
    ]
    if mean is not None:
        rows.append(("mean", "", "", "", "", score_text(mean.pruned), score_text(mean.uniform)))
    return rows


HEAD = ("benchmark", "full", "found", "found - full\n95 % CI", "uniform", "found\n% of full", "uniform\n% of full")


def against_uniform(scores: Mapping[str, ScoreComparison]) -> list[str]:
    """On which benchmarks the found strategy beats uniform reduction, by the paired interval; nothing without it."""
    intervals = {name: item.uniform_ci95 for name, item in scores.items() if item.uniform_ci95 is not None}
    if not intervals:
        return []
    better = [name for name, (low, _) in intervals.items() if low > 0.0]
    worse = [name for name, (_, high) in intervals.items() if high < 0.0]
    parts = [f"{word} on {', '.join(names)}" for word, names in (("better", better), ("worse", worse)) if names]
    rest = len(intervals) - len(better) - len(worse)
    if rest:
        parts.append(f"no difference shown on {rest}")
    return [f"Against uniform (paired): {'; '.join(parts)}."]


def score_summary(record: Record) -> RenderableType | None:
    """A table per budget for the terminal; ``None`` if no suite ran."""
    parts: list[RenderableType] = []
    for result in record.results:
        if result.scores:
            title = f"budget {result.budget.text}: {percent_text(result.flops_ratio)} % of the FLOPs"
            parts += [Text(title, style="bold"), _table(result.scores, result.relative_mean)]
            parts += [Text(line, style="dim") for line in against_uniform(result.scores)] + [Text("")]
    if not parts:
        return None
    return Group(*parts, Text("\n".join(score_notes(record)), style="dim"))


def eval_summary(record: EvalRecord) -> RenderableType:
    """A table per strategy for the terminal; without strategies, the full model's scores."""
    parts: list[RenderableType] = []
    for item in record.strategies:
        flops = "" if item.flops_ratio is None else f", {percent_text(item.flops_ratio)} % of the FLOPs"
        parts.append(Text(f"{item.name}: {item.description}{flops}", style="bold"))
        parts += [_table(item.scores, item.relative_mean), Text("")]
    if not record.strategies:
        table = plain_table(("benchmark", "full", "samples"), "benchmark")
        for name, score in record.full.items():
            table.add_row(_with_unit(name, record.units[name]), score_text(score), str(record.num_samples[name]))
        parts += [table, Text("")]
    notes = _notes(record.model.name, record.suite)[: None if record.strategies else 1]
    return Group(*parts, Text("\n".join(notes), style="dim"))


def score_notes(record: Record) -> list[str]:
    """What has to be known to read the scores."""
    return [] if record.scores is None else _notes(record.model.name, record.scores)


def _notes(model: str, suite: SuiteInfo) -> list[str]:
    limit = f", at most {suite.limit} samples each" if suite.limit else ""
    return [f"{model} on {suite.suite}{limit}.", *SCORE_NOTES]


def _with_unit(name: str, unit: str) -> str:
    return name if unit == "%" else f"{name} ({unit})"


def _table(scores: Mapping[str, ScoreComparison], mean: RelativeMean | None) -> Table:
    rows = score_rows(scores, mean)
    has_uniform = any(item.uniform is not None for item in scores.values())
    kept = [i for i, name in enumerate(HEAD) if has_uniform or not name.startswith("uniform")]
    table = plain_table([HEAD[i] for i in kept], HEAD[0])
    for row in rows:
        table.add_row(*(row[i] for i in kept), style="bold" if row[0] == "mean" else None)
    return table


def relative_scores(record: Record) -> Figure:
    """Per cent of the full model's score by benchmark, one panel per budget: found and uniform."""
    judged = [result for result in record.results if result.scores]
    names = list(judged[0].scores)
    with styled():
        figure = Figure(figsize=(7.2, 0.6 + 2.0 * len(judged)), layout="constrained")
        axes = figure.subplots(len(judged), 1, sharex=True, squeeze=False)[:, 0]
        for axis, result in zip(axes, judged, strict=True):
            axis.axhline(100.0, color=FAINT, linewidth=0.9, zorder=0)
            mean = result.relative_mean or RelativeMean(pruned=None)
            for values, average, offset, color, marker, label in (
                ([result.scores[n].relative_pruned for n in names], mean.pruned, -0.12, FOUND, "o", "found"),
                ([result.scores[n].relative_uniform for n in names], mean.uniform, 0.12, UNIFORM, "s", "uniform"),
            ):
                points = [(i + offset, v) for i, v in enumerate([*values, average]) if v is not None]
                if points:
                    at, heights = zip(*points, strict=True)
                    axis.vlines(at, 100.0, heights, color=color, linewidth=1.0)
                    axis.plot(at, heights, marker, color=color, linestyle="", label=label)
            axis.axvline(len(names) - 0.5, color=FAINT, linewidth=0.6)
            axis.set_ylabel("% of full")
            axis.set_title(f"budget {result.budget.text}")
        axes[-1].set_xticks(range(len(names) + 1), [*names, "mean"], rotation=40, ha="right")
        axes[0].legend(loc="lower left", ncols=2)
    return figure
