"""The summary of a record for the terminal: found strategy and uniform reduction, budget by budget."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dop_search.app.record import Record, Result
from dop_search.app.report.text import NONE, interval_text, kl_text, notes, percent_text, policy_text

_RIGHT = ("n_v", "FLOPs\n%", "acc.\n%", "runs\ntime")


def summary(record: Record) -> RenderableType:
    """A table that is readable at 80 columns, and below it what has to be known to read it."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for name in (
        "budget",
        "\nmethod",
        "D_A\n[dim]ratio[/dim]",
        "D_P\n[dim]ratio[/dim]",
        "n_v",
        "FLOPs\n%",
        "KL search\n[dim]additive[/dim]",
        "KL held-out\n[dim]95 % CI[/dim]",
        "acc.\n%",
        "runs\ntime",
    ):
        table.add_column(name, justify="right" if name in _RIGHT else "left", no_wrap=True)
    for result in record.results:
        table.add_row()
        _add_rows(table, result)
    table.add_row()
    return Group(table, Text("\n".join(notes(record)), style="dim"))


def _add_rows(table: Table, result: Result) -> None:
    policy, uniform = policy_text(result.strategy), result.uniform
    table.add_row(
        Text(result.budget.text, style="bold"),
        Text("found", style="bold"),
        _lines(policy.attention, policy.attention_ratio),
        _lines(policy.mlp, policy.mlp_ratio),
        policy.num_visual_tokens,
        percent_text(result.flops_ratio),
        _lines([kl_text(result.kl_search)], [kl_text(result.kl_additive)]),
        _lines([kl_text(result.kl_heldout)], [interval_text(result.kl_heldout_ci95)], style="bold"),
        percent_text(result.accuracy_pruned),
        _lines([str(result.num_validation_runs)], [f"{result.seconds:.0f} s"]),
    )
    if uniform is None:
        table.add_row("", "uniform", style="dim")
        return
    table.add_row(
        "",
        "uniform",
        "all",
        "all",
        str(uniform.num_visual_tokens),
        percent_text(uniform.flops_ratio),
        _lines([kl_text(uniform.kl_search)], [kl_text(uniform.kl_additive)]),
        _lines([kl_text(uniform.kl_heldout)], [interval_text(uniform.kl_heldout_ci95)]),
        percent_text(uniform.accuracy),
        "",
    )


def _lines(first: Sequence[str], second: Sequence[str], style: str = "") -> Text:
    below = [line for line in second if line != NONE]
    return Text.assemble(("\n".join(first), style), *(("\n" + line, "dim") for line in below))
