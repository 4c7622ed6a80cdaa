"""Which objective on the search samples foretells what happens on new ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from dop_search.app.report.style import FAINT, LOOKS, plain_decades, styled

NAMES = {
    "kl": "KL",
    "reverse_kl": "reverse KL",
    "js": "Jensen–Shannon",
    "logit_mse": "MSE of logits",
    "top1_changed": "top token changed",
    "answer_changed": "answer changed",
    "wrong": "answer wrong",
    "root_kl": "√KL",
    "trimmed_kl": "KL without its largest tenth",
    "clipped_kl": "KL, at most 1 nat a sample",
    "worst_family_kl": "KL of the worst family",
}
_TARGETS = {"kl": "held-out KL", "accuracy": "accuracy on test samples"}


def figures(result: Mapping[str, Any]) -> dict[str, Figure]:
    """``objective``: Spearman's correlation with both targets, and the KL of what each objective would choose."""
    summary = result["summary"]
    names = sorted(summary, key=lambda name: summary[name]["kl"]["spearman"])
    if not names:
        return {}
    with styled():
        figure = Figure(figsize=(10.4, 1.5 + 0.26 * len(names)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for index, (target, label) in enumerate(_TARGETS.items()):
            look, y = LOOKS[index], np.arange(len(names)) + 0.14 * (1 - 2 * index)
            low, high = np.array([summary[name][target]["ci95"] for name in names]).T
            left.hlines(y, low, high, color=look.color, linewidth=1.0)
            values = [summary[name][target]["spearman"] for name in names]
            left.plot(values, y, color=look.color, marker=look.marker, linestyle="", label=f"with {label}")
        left.set_yticks(range(len(names)), [NAMES.get(name, name) for name in names])
        left.set_xlabel("Spearman, mean over budgets (bars: 95 % of resamples)")
        left.set_title("What foretells new samples")
        for index, budget in enumerate(summary[names[0]]["chosen"]):
            look = LOOKS[2 + index % 4]
            values = [summary[name]["chosen"][budget]["kl_heldout"] for name in names]
            right.plot(
                values, range(len(names)), color=look.color, marker=look.marker, linestyle="", label=f"budget {budget}"
            )
        right.axhline(names.index("kl"), color=FAINT, linewidth=0.5)
        right.set_xscale("log")
        plain_decades(right.xaxis)
        right.set_xlabel("held-out KL of the strategy it would choose (nats)")
        right.set_title("What it chooses, by budget")
        left.legend(loc="upper left", bbox_to_anchor=(0.0, -0.14), ncols=2)
        right.legend(loc="upper left", bbox_to_anchor=(0.0, -0.14), ncols=4)
    return {"objective": figure}


def table(result: Mapping[str, Any]) -> Table:
    """Objectives by their correlation with held-out KL."""
    summary = result["summary"]
    made = Table(title="Spearman with new samples, mean over the budgets (95 % of resamples)", title_justify="left")
    for column in ("objective", *_TARGETS.values()):
        made.add_column(column)
    for name in sorted(summary, key=lambda name: -summary[name]["kl"]["spearman"]):
        cells = [summary[name][target] for target in _TARGETS]
        made.add_row(
            NAMES.get(name, name), *(f"{c['spearman']:.2f} ({c['ci95'][0]:.2f}…{c['ci95'][1]:.2f})" for c in cells)
        )
    return made
