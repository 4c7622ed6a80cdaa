"""The final set: samples that nothing was chosen on, measured once per release, whatever comes out.

All other studies share one held-out set, and defaults were chosen on it. Here the rendered samples are of a seed that
no other command accepts. A row is of a release and is never measured again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import PositiveInt, PrivateAttr, field_validator
from rich.table import Table

from dop_search import __version__
from dop_search.app.config import SearchConfig
from dop_search.app.config.schema import FINAL_SEED
from dop_search.app.config.section import Listed
from dop_search.app.results import ResultFile, Row
from dop_search.app.study import Measured, Result, Study
from dop_search.app.workbench import Workbench
from dop_search.baselines import known_methods, plain_outcome
from dop_search.data.samples import ValidationSet
from dop_search.data.validation import validation_set
from dop_search.divergence import Teacher, make_teacher
from dop_search.utils.errors import ConfigError
from dop_search.utils.intervals import holm, mean_ci95, num_dominant, sign_flip_p


class Final(Study):
    """Fit on the search samples, measure on the final ones."""

    question = "What do the methods lose on samples that nothing was chosen on?"
    rows = "methods on the final set"
    reads = ("search",)
    group = ("method",)
    adds_rows = frozenset({"methods"})

    methods: Listed[str] = ("uniform", "dop_split")
    """Names as for ``dop-eval method=…``."""
    reference: str = "uniform"
    """The method that the others are tested against."""
    num_final: PositiveInt = 2000
    """Final samples."""

    _final: tuple[ValidationSet, Teacher] | None = PrivateAttr(default=None)

    _are_known = field_validator("methods")(known_methods)

    def check(self, config: SearchConfig) -> None:
        """See base class."""
        if config.data.name != "pocket":
            raise ConfigError(
                f"the final set is rendered, but got data={config.data.name}; for other data keep a file of samples "
                "that nothing else reads, and give it as data.path of a run of its own"
            )

    def keys(self, bench: Workbench) -> list[dict[str, Any]]:
        """See base class."""
        return [
            {"release": __version__, "method": method, "budget": budget}
            for method in self.methods
            for budget in bench.budgets
        ]

    def row(self, bench: Workbench, release: str, method: str, budget: float) -> Measured:
        """See base class."""
        fitted = bench.fit(method, budget)
        data, teacher = self._samples(bench)
        outcome = plain_outcome(bench.loaded, data.samples, teacher, fitted)
        return {
            "flops_ratio": fitted.flops_ratio,
            "kl_final": float(outcome.divergence.mean()),
            "kl_ci95": mean_ci95(outcome.divergence, bench.config.seed),
            "num_dominant": num_dominant(outcome.divergence),
            "same_answers": float(outcome.same_answer.mean()),
            "hyperparameters": dict(fitted.hyperparameters),
        }, outcome.divergence

    def _samples(self, bench: Workbench) -> tuple[ValidationSet, Teacher]:
        if self._final is None:
            config = bench.config
            data = validation_set("pocket", self.num_final, FINAL_SEED, "heldout", families=config.data.families)
            teacher = make_teacher(
                bench.loaded,
                data,
                bench.selector(),
                max_new_tokens=config.data.max_new_tokens,
                batch_size=config.batch_size,
                memory=config.memory,
                cache_dir=bench.cache,
            )
            self._final = data, teacher
        return self._final

    def summarize(self, bench: Workbench, results: ResultFile) -> dict[str, Any]:
        """Differences to ``reference`` of the same release and budget; p-values by sign flips, Holm per release."""
        found: list[Row] = []
        for row in results.rows:
            key = {name: row[name] for name in ("release", "method", "budget")}
            ours, theirs = results.per_sample({**key, "method": self.reference}), results.per_sample(key)
            if row["method"] != self.reference and ours is not None and theirs is not None:
                difference = np.asarray(theirs - ours)
                values = {"mean": float(difference.mean()), "ci95": mean_ci95(difference), "p": sign_flip_p(difference)}
                found.append({**key, **values})
        for release in {item["release"] for item in found}:
            its = [item for item in found if item["release"] == release]
            for item, p_value in zip(its, holm([item["p"] for item in its]), strict=True):
                item["p"] = p_value
        return {"reference": self.reference, "differences": found}

    @staticmethod
    def table(result: Result) -> Table:
        """A line per release, method and budget."""
        made = Table(title="KL on the final set (nats)", title_justify="left")
        for name in ("release", "method", "budget", "KL", "95 % CI", "same answers"):
            made.add_column(name)
        for row in result["rows"]:
            if "kl_final" in row:
                low, high = row["kl_ci95"]
                cells = (f"{row['kl_final']:.4f}", f"{low:.4f} to {high:.4f}", f"{row['same_answers']:.3f}")
                made.add_row(row["release"], row["method"], f"{row['budget']:g}", *cells)
        return made
