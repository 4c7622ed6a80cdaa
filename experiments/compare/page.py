"""What README.md says in numbers, written into it from ``result.json``: ``python -m experiments.compare.page``."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
BEGIN, END = "<!-- from result.json: python -m experiments.compare.page -->\n", "<!-- end -->\n"
SIGNIFICANT = 0.05
"""After Holm's correction over all tests of the table."""
WIDTH = 120

Rows = Mapping[tuple[str, float], Mapping[str, Any]]


def numbers(result: Mapping[str, Any]) -> str:
    """Table and findings, as Markdown."""
    rows = {(row["method"], row["budget"]): row for row in result["rows"]}
    budgets = list(dict.fromkeys(row["budget"] for row in result["rows"]))
    table, findings = _table(result, rows, budgets), _findings(result, rows, budgets)
    return f"{_setting(result)}\n\n{table}\n\n## What it says\n\n{findings}\n"


def write(folder: Path = FOLDER) -> None:
    """Put the numbers of a folder's result into its README."""
    readme, result = folder / "README.md", json.loads((folder / "result.json").read_text(encoding="utf-8"))
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    readme.write_text(f"{before}{BEGIN}\n{numbers(result)}\n{END}{after}", encoding="utf-8")


def _setting(result: Mapping[str, Any]) -> str:
    samples, methods = result["setup"]["samples"], {row["method"] for row in result["rows"]}
    accuracy = result["summary"]["full"].get("accuracy")
    full = "" if accuracy is None else f" ({100 * accuracy:.1f} %)"
    return _wrapped(
        f"{len(methods)} methods on {samples['heldout']} held-out samples; what measures, measures on "
        f"{samples['search']} others. Cells: held-out KL in nats, and accuracy in per cent of the full model's{full}, "
        "mean over question families. *Rank*: by held-out KL, mean over the budgets. A method that cannot go so low is "
        "last there (–)."
    )


def _table(result: Mapping[str, Any], rows: Rows, budgets: list[float]) -> str:
    rank = result["summary"]["mean_rank"]
    methods = list(dict.fromkeys([*rank, *(method for method, _ in rows)]))
    lines = [
        f"| method | rank | {' | '.join(f'{budget:g}' for budget in budgets)} |",
        "|---|---|" + "---|" * len(budgets),
    ]
    for method in methods:
        cells = [_cell(rows.get((method, budget))) for budget in budgets]
        name = f"**{method}**" if is_ours(method) else method
        lines.append(f"| {name} | {f'{rank[method]:.1f}' if method in rank else ''} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    if "kl_heldout" not in row:
        return "failed" if "failed" in row else "–"
    return f"{row['kl_heldout']:.3f}, {row['relative_mean']:.0f}"


def _findings(result: Mapping[str, Any], rows: Rows, budgets: list[float]) -> str:
    lines = []
    reference, differences = result["summary"]["reference"], result["summary"]["differences"]
    for budget in budgets:
        its = {name: row for (name, at), row in rows.items() if at == budget and "kl_heldout" in row}
        if not its:
            continue
        kl = {name: row["kl_heldout"] for name, row in its.items()}
        best, ours, theirs = (_best(kl, keep) for keep in (lambda _: True, is_ours, lambda name: not is_ours(name)))
        text = f"**At {budget:g}** the lowest KL is {best}; of ours {ours}, of others {theirs}."
        if between := differences.get(f"{budget:g}"):
            sides = {
                sign: [n for n, x in between.items() if x["p"] < SIGNIFICANT and sign * x["mean"] > 0]
                for sign in (1, -1)
            }
            text += (
                f" Significantly different from `{reference}` ({kl[reference]:.3f}): {len(sides[1])} of {len(between)} "
                f"are worse, better {_names(sides[-1])}."
            )
        most = max(row["relative_mean"] for row in its.values())
        good = sorted((n for n in its if its[n]["relative_mean"] >= most - 1), key=kl.__getitem__)
        text += f" Within a point of the highest accuracy ({most:.0f} %): {_names(good[:6])}"
        lines.append(text + (f" and {len(good) - 6} more." if len(good) > 6 else "."))
    for selector in dict.fromkeys(name.partition("@")[2] for name, _ in rows if name.startswith("dop_split@")):
        pairs = [(rows.get((f"dop_split@{selector}", b), {}), rows.get((selector, b), {})) for b in budgets]
        both = [
            (b, x["kl_heldout"], y["kl_heldout"])
            for b, (x, y) in zip(budgets, pairs, strict=True)
            if "kl_heldout" in x and "kl_heldout" in y
        ]
        if both:
            cells = ", ".join(f"{b:g}: {x:.3f} and {y:.3f}" for b, x, y in both)
            lines.append(f"`{selector}` with operations skipped (`dop_split`) and with fewer tokens alone: {cells}.")
    impossible: dict[str, list[float]] = {}
    for (name, budget), row in rows.items():
        if "infeasible" in row:
            impossible.setdefault(name, []).append(budget)
    if impossible:
        cells = "; ".join(
            f"{', '.join(f'{b:g}' for b in its)}: {_names(n for n, x in impossible.items() if x == its)}"
            for its in _unique(impossible.values())
        )
        lines.append(f"Cannot be so cheap, or not on this model, at {cells}.")
    return "\n".join(_wrapped(f"- {line}", "  ") for line in lines)


def is_ours(method: str) -> bool:
    """Whether it is one of this project's searches."""
    return method.startswith("dop")


def _best(kl: Mapping[str, float], keep: Any) -> str:
    its = [name for name in kl if keep(name)]
    return f"`{min(its, key=kl.__getitem__)}` ({min(kl[name] for name in its):.3f})" if its else "none measured"


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


def _unique(items: Iterable[list[float]]) -> list[list[float]]:
    return [list(item) for item in dict.fromkeys(map(tuple, items))]


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    write()
