"""Of what kind the samples should be that a search sees."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from pydantic import PositiveInt

from dop_search.app.report.style import FAINT, LOOKS, plain_decades, styled
from dop_search.app.results import Row
from dop_search.app.study import Measured, Result, Study
from dop_search.app.workbench import Workbench
from dop_search.search.additive_exact import additive_exact
from dop_search.strategy.cost import Budget
from dop_search.utils.errors import ConfigError
from experiments.validation_size.crossed import crossed
from experiments.validation_size.rules import measured_budgets, measured_rows, on_samples

_SMALLEST_DRAWN = 0.01


class ValidationSource(Study):
    """Searches on the questions of one family, scored on held-out questions of the same and of all other families.

    Beside each stand searches on as many samples of all families, drawn at random, scored on the same questions. All
    take the additive optimum, which needs no validation run beyond the curves. The families are those of the search
    samples.
    """

    question = "Does a search on one kind of question serve the others?"
    rows = "searches on one family"

    num_draws: PositiveInt = 12
    """Random sets beside each family."""

    def keys(self, bench: Workbench) -> list[dict[str, Any]]:
        """See base class."""
        names = _families(bench)
        if len(names) < 2:
            raise ConfigError(
                f"the search samples have {len(names)} families with two or more samples; raise data.num_samples, or "
                "use a data set of several kinds of question, e.g. data=mixed"
            )
        return [{"family": name, "budget": budget} for budget in bench.budgets for name in names]

    def row(self, bench: Workbench, family: str, budget: float) -> Measured:
        """See base class."""
        families = np.array([sample.family for sample in bench.data("search")])
        asked = np.array([sample.family for sample in bench.data("heldout")])
        whole, limit = bench.profile(), Budget(flops_ratio=budget)
        its = np.flatnonzero(families == family)
        rng = np.random.default_rng([bench.config.seed, _families(bench).index(family)])
        draws = [rng.permutation(len(families))[: len(its)] for _ in range(self.num_draws)]
        chosen = [
            additive_exact(on_samples(whole, indices).problem(limit), limit).strategy for indices in (its, *draws)
        ]
        kl = bench.divergence(chosen)
        own, mixed = kl[0], kl[1:].mean(axis=0)
        difference = crossed((own - kl[1:])[:, asked != family])
        values: Row = {
            "num_samples": len(its),
            "strategy": chosen[0].describe(),
            "kl_same_family": float(own[asked == family].mean()) if (asked == family).any() else None,
            "kl_same_family_mixed": float(mixed[asked == family].mean()) if (asked == family).any() else None,
            "kl_others": float(own[asked != family].mean()),
            "kl_others_mixed": float(mixed[asked != family].mean()),
            "difference_ci95": difference.ci95,
            "difference_p": difference.p,
        }
        return values, own

    @staticmethod
    def figures(result: Result) -> dict[str, Figure]:
        """``validation_source``: KL on the other families' questions, beside as many mixed search samples."""
        budgets = measured_budgets(result)
        if not budgets:
            return {}
        count = max(len(measured_rows(result, budget, "family")) for budget in budgets)
        with styled():
            figure = Figure(figsize=(5.2 * len(budgets), 1.4 + 0.26 * count), layout="constrained")
            for axis, budget in zip(figure.subplots(1, len(budgets), squeeze=False)[0], budgets, strict=True):
                rows = sorted(measured_rows(result, budget, "family"), key=lambda row: -float(row["kl_others"]))
                for y, row in enumerate(rows):
                    low, high = row["difference_ci95"] or (-1.0, 1.0)
                    sure = low > 0.0 or high < 0.0
                    ends = [max(row[field], _SMALLEST_DRAWN) for field in ("kl_others_mixed", "kl_others")]
                    color, width = ("black", 2.0) if sure else (FAINT, 0.8)
                    axis.plot(ends, [y, y], zorder=1, color=color, linewidth=width)
                for field, look, name in (
                    ("kl_others", LOOKS[0], "searched on this family, scored on the others"),
                    ("kl_others_mixed", LOOKS[1], "searched on as many of all families, same questions"),
                    ("kl_same_family", LOOKS[2], "searched on this family, scored on it"),
                ):
                    points = [(row[field], y) for y, row in enumerate(rows) if row[field] is not None]
                    x, y_ = zip(*((max(value, _SMALLEST_DRAWN), y) for value, y in points), strict=True)
                    axis.plot(x, y_, color=look.color, marker=look.marker, linestyle="", label=name)
                axis.set_xscale("log")
                plain_decades(axis.xaxis)
                axis.set_yticks(range(len(rows)), [row["family"] for row in rows])
                axis.set_title(f"budget {budget:g}")
                axis.set_xlabel(f"held-out KL of the additive optimum (nats; {_SMALLEST_DRAWN:g}: that or less)")
            axis.plot([], [], color="black", linewidth=2.0, label="95 % interval of the difference without 0")
            handles, labels = axis.get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=2)
        return {"validation_source": figure}


def _families(bench: Workbench) -> list[str]:
    """Those with two or more search samples."""
    families = [sample.family for sample in bench.data("search")]
    return [name for name in dict.fromkeys(families) if families.count(name) >= 2]
