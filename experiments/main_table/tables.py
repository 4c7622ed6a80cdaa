"""The main table as Markdown, LaTeX and CSV, and the published numbers that it stands beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

PUBLISHED = Path(__file__).parent / "published.yaml"
Line = tuple[str, ...]


def cells(result: Mapping[str, Any]) -> tuple[Line, list[Line]]:
    """Head and lines of the table, as text; – where a method cannot go so low."""
    benchmarks: list[str] = result["summary"].get("benchmarks", [])
    rows = {(r["model"], r["method"], r["budget"], r["benchmark"]): r for r in result["rows"]}
    head = ("model", "method", "budget", "FLOPs %", *benchmarks, "mean %", "95 % CI", "p", "prefill")
    lines = []
    for item in result["summary"].get("methods", ()):
        key = (item["model"], item["method"], item["budget"])
        scores = [rows.get((*key, name), {}).get("score") for name in benchmarks]
        interval = item.get("ci95")
        lines.append(
            (
                Path(item["model"]).name,
                item["method"],
                f"{item['budget']:g}",
                _number(item.get("flops_ratio"), 1, 100.0),
                *(_number(score, 1) for score in scores),
                _number(item.get("relative_mean"), 1),
                "–" if interval is None else f"{interval[0]:.1f} to {interval[1]:.1f}",
                _number(item.get("p"), 3),
                _number(item.get("prefill_ms_ratio"), 2),
            )
        )
    return head, lines


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """The files of the table by name."""
    head, lines = cells(result)
    frame = pd.DataFrame(lines, columns=head)
    return {
        "table.md": markdown(head, lines),
        "table.csv": frame.to_csv(index=False),
        "table.tex": frame.to_latex(index=False, escape=True),
        "published.md": published(),
    }


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Scores of every method at the same FLOPs."""
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def published() -> str:
    """The published numbers that are known, as Markdown, with their sources."""
    parts = []
    for table in yaml.safe_load(PUBLISHED.read_text(encoding="utf-8")):
        head = ("method", "tokens", "FLOPs %", *table["columns"], "mean %")
        lines = [
            (
                str(row["method"]),
                str(row["tokens"]),
                _number(table["flops_ratio"][row["tokens"]], 1, 100.0),
                *(_number(value, 1) for value in row.get("scores", [None] * len(table["columns"]))),
                _number(row.get("mean"), 1),
            )
            for row in table["rows"]
        ]
        parts.append(f"{table['model']}: {table['source']}\n\n{markdown(head, lines)}")
    return "\n".join(parts)


def _number(value: float | None, digits: int, factor: float = 1.0) -> str:
    return "–" if value is None else f"{factor * value:.{digits}f}"
