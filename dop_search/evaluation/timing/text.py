"""A comparison as plain text, 100 columns or so."""

from __future__ import annotations

from collections.abc import Sequence

from dop_search.evaluation.timing.comparison import EMPTY_TOLERANCE, OVERHEAD_FACTOR, OVERHEAD_OFFSET, Comparison, Row
from dop_search.utils.statistics import Spread

NONE = "n/a"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as aligned lines, the first column to the left."""
    first, *widths = (max(map(len, cells)) for cells in zip(*rows, strict=True))
    lines = []
    for name, *cells in rows:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        lines.append("  ".join([name.ljust(first), *aligned]).rstrip())
    return lines


def comparison_text(comparison: Comparison) -> str:
    """What was measured, where, each variant's times, the prefill comparison with its verdicts, and the notes."""
    facts, counts = comparison.environment, comparison.counts
    threads = "" if facts["num_threads"] is None else f", {facts['num_threads']} threads"
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    rounds = len(comparison.full.readings)
    clock = "" if facts["clock"] == "wall" else " that this process computed"
    lines = [
        comparison.what,
        f"{facts['device']}{threads}, {facts['dtype']}, attention backend {facts['attn_implementation']}, {versions}",
        f"{counts.text} text and {counts.visual} visual tokens, {comparison.num_tokens} generated; "
        f"median of {rounds} interleaved rounds, times in ms{clock}",
        "",
        *columns(
            [
                ["", "vision", "prefill", "95 % CI", "per token", "end to end", "peak memory", "KV cache"],
                *(_times(row) for row in comparison.rows),
            ]
        ),
        "",
        "Prefill time against FLOPs, relative to the full model of the same round.",
        f"Aim: time <= {OVERHEAD_FACTOR:.2f} x FLOPs + {OVERHEAD_OFFSET:.2f}; "
        f"empty strategy within {EMPTY_TOLERANCE:.0%} of the plain model.",
        "",
        *columns(
            [
                ["", "FLOPs", "time", "95 % CI", "aim", "", "end to end", ""],
                *(_verdict(row, comparison.full) for row in comparison.rows[1:]),
            ]
        ),
    ]
    if comparison.notes:
        lines += ["", *comparison.notes]
    return "\n".join(lines)


def _name(row: Row) -> str:
    target = row.variant.target_ratio
    return row.variant.name if target is None else f"{target:g} {row.variant.name}"


def _times(row: Row) -> list[str]:
    prefill = row.prefill
    return [
        _name(row),
        _ms(row.spread("vision_ms")),
        _ms(prefill),
        f"{prefill.ci95[0]:.1f}…{prefill.ci95[1]:.1f}",
        *(_ms(row.spread(metric)) for metric in ("decode_ms", "end_to_end_ms")),
        *(_bytes(row.spread(metric)) for metric in ("peak_bytes", "kv_bytes")),
    ]


def _verdict(row: Row, full: Row) -> list[str]:
    ratio, end_to_end, strategy = row.prefill_ratio(full), row.ratio(full, "end_to_end_ms"), row.variant.strategy
    what = f"n_v={row.variant.num_visual_tokens}" if strategy is None else strategy.describe()
    return [
        _name(row),
        f"{row.variant.flops_ratio:.3f}",
        f"{ratio.median:.3f}",
        f"{ratio.ci95[0]:.3f}…{ratio.ci95[1]:.3f}",
        NONE if row.allowed_ratio is None else f"{row.allowed_ratio:.3f}",
        "pass" if row.passes(full) else "FAIL",
        NONE if end_to_end is None else f"{end_to_end.median:.3f}",
        what,
    ]


def _ms(value: Spread | None) -> str:
    if value is None:
        return NONE
    return f"{value.median:.2f}" if value.median < 10 else f"{value.median:.1f}"


def _bytes(value: Spread | None) -> str:
    if value is None:
        return NONE
    mib = value.median / 2**20
    return f"{mib:.1f} MiB" if mib < 1024 else f"{mib / 1024:.2f} GiB"
