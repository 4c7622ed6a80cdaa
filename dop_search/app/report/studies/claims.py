"""The paper's claims as a table: in Markdown for a README, and for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table


def markdown(result: Mapping[str, Any]) -> str:
    """The table of ``experiments/claims/README.md``."""
    lines = ["| the paper | measured here | to check it | command |", "|---|---|---|---|"]
    for row in result["rows"]:
        links = ", ".join(f"[{name}](../{name}/README.md)" for name in row["sources"])
        measured = f"{row['measured']} ({links})" if links else row["measured"]
        lines.append(f"| {row['claimed']} | {measured} | {row['needed']} | `{row['command']}` |")
    return "\n".join(lines) + "\n"


def table(result: Mapping[str, Any]) -> Table:
    """Claims beside what was measured."""
    made = Table(title="The paper's claims", title_justify="left", show_lines=True)
    made.add_column("the paper")
    made.add_column("measured here")
    for row in result["rows"]:
        made.add_row(row["claimed"], row["measured"])
    return made
