"""The summary of a record for the terminal: found strategy and uniform reduction, a line each."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dop_search.app.record import Record, Result
from dop_search.app.report.text import interval_text, kl_text, notes, percent_text, policy_text

_COLUMNS = ("budget", "method", "D_A", "D_P", "n_v", "FLOPs %", "KL search", "KL held-out", "95 % CI", "acc. %")
_LEFT = ("budget", "method", "95 % CI")


def summary(record: Record) -> RenderableType:
    """A table that is readable at 80 columns, and below it what has to be known to read it."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for name in _COLUMNS:
        header = name if name == "95 % CI" else name.replace(" ", "\n")
        table.add_column(header, justify="left" if name in _LEFT else "right", no_wrap=True, vertical="bottom")
    for result in record.results:
        _add_rows(table, result)
    return Group(table, Text("\n" + "\n".join(notes(record)), style="dim"))


def _add_rows(table: Table, result: Result) -> None:
    policy, uniform = policy_text(result.strategy), result.uniform
    table.add_row(
        Text(result.budget.text, style="bold"),
        Text("found", style="bold"),
        "\n".join(policy.attention),
        "\n".join(policy.mlp),
        policy.num_visual_tokens,
        percent_text(result.flops_ratio),
        kl_text(result.kl_search),
        Text(kl_text(result.kl_heldout), style="bold"),
        interval_text(result.kl_heldout_ci95),
        percent_text(result.accuracy_pruned),
    )
    if uniform is not None:
        table.add_row(
            "",
            "uniform",
            "all",
            "all",
            str(uniform.num_visual_tokens),
            percent_text(uniform.flops_ratio),
            kl_text(uniform.kl_search),
            kl_text(uniform.kl_heldout),
            interval_text(uniform.kl_heldout_ci95),
            percent_text(uniform.accuracy),
        )
