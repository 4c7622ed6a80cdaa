"""The results of a record as rows of text, and their summaries for a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dop_search.app.record import Record, Result, UniformResult
from dop_search.app.report.text import interval_text, kl_text, notes, percent_text, policy_text, verdict

_COLUMNS = ("budget", "method", "D_A", "D_P", "n_v", "FLOPs %", "KL search", "KL held-out", "95 % CI", "acc. %")
_LEFT = ("budget", "method", "95 % CI")


def result_rows(record: Record) -> list[dict[str, str]]:
    """The found strategy and uniform reduction of every budget, a row each: column by name → text."""
    return [row for result in record.results for row in _rows(result)]


def _rows(result: Result) -> list[dict[str, str]]:
    found = {
        "budget": result.budget.text,
        "method": "found",
        **policy_text(result.strategy),
        **_numbers(result),
        "CI search": interval_text(result.kl_search_ci95),
        "acc. %": percent_text(result.accuracy_pruned),
        "against uniform": verdict(result),
        "runs": str(result.num_validation_runs),
        "seconds": f"{result.seconds:.1f}",
    }
    uniform = result.uniform
    if uniform is None:
        return [found]
    policy = {"D_A": "all", "D_P": "all", "n_v": str(uniform.num_visual_tokens)}
    accuracy = percent_text(uniform.accuracy)
    return [found, {"budget": "", "method": "uniform", **policy, **_numbers(uniform), "acc. %": accuracy}]


def _numbers(item: Result | UniformResult) -> dict[str, str]:
    return {
        "FLOPs %": percent_text(item.flops_ratio),
        "KV %": percent_text(item.kv_ratio),
        "KL additive": kl_text(item.kl_additive),
        "KL search": kl_text(item.kl_search),
        "KL held-out": kl_text(item.kl_heldout),
        "95 % CI": interval_text(item.kl_heldout_ci95),
    }


def summary(record: Record) -> RenderableType:
    """A table that is readable at 80 columns, and below it what has to be known to read it."""
    table = plain_table([name if name == "95 % CI" else name.replace(" ", "\n") for name in _COLUMNS], _LEFT, pad=1)
    for row in result_rows(record):
        bold = ("budget", "method", "KL held-out") if row["method"] == "found" else ()
        lines = {**row, **{name: row[name].replace(",", "\n") for name in ("D_A", "D_P")}}  # a line per group
        table.add_row(*(Text(lines[name], style="bold" if name in bold else "") for name in _COLUMNS))
    return Group(table, Text("\n" + "\n".join(notes(record)), style="dim"))


def plain_table(heads: Sequence[str], left: Sequence[str], pad: int = 2) -> Table:
    """A table without lines; the columns of ``left`` are flush left, the others right."""
    table = Table(box=None, padding=(0, pad, 0, 0), pad_edge=False, header_style="bold")
    for head in heads:
        table.add_column(head, justify="left" if head in left else "right", no_wrap=True, vertical="bottom")
    return table


def markdown(record: Record) -> str:
    """The summary's table in Markdown."""
    lines = [_COLUMNS, ["---"] * len(_COLUMNS), *([row[name] for name in _COLUMNS] for row in result_rows(record))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
