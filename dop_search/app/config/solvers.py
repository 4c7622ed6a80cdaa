"""What can be configured of the solvers: one section each, chosen by the key ``solver``."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt

from dop_search.app.config.section import Section

Criterion = Literal["kl", "root_kl"]
"""How candidates are ranked by their exact KL per sample, see ``dop_search.search.criteria``."""
Sampler = Literal["tpe", "gp", "cmaes", "nsga2", "random"]
"""The Optuna samplers on offer."""


def _without_password(location: str) -> str:
    if "://" in location and urlsplit(location).password:
        raise ValueError(
            "a password in a storage's URL would be written to records and logs; leave it out and set PGPASSWORD, or "
            "write it to ~/.pgpass (for PostgreSQL)"
        )
    return location


Storage = Annotated[str, Field(min_length=1), AfterValidator(_without_password)]
"""An Optuna storage: a journal file, or a database URL."""


class AdditiveExactConfig(Section):
    """The provable optimum of the additive surrogate, then the best few by exact KL."""

    solver: Literal["additive_exact"] = "additive_exact"
    num_rerank: PositiveInt = 16
    """Candidates near the additive optimum whose exact KL decides (uniform reduction is always among them)."""
    criterion: Criterion = "kl"
    """Of the exact KL per sample: ``kl``, the mean, or ``root_kl``, the mean of the roots (few samples decide less)."""


class AdditiveOptunaConfig(Section):
    """An Optuna sampler on the additive surrogate."""

    solver: Literal["additive_optuna"] = "additive_optuna"
    sampler: Sampler = "tpe"
    """An Optuna sampler."""
    num_trials: PositiveInt = 2000
    """Trials per budget; each takes no validation run."""
    num_rerank: PositiveInt = 16
    """As with ``additive_exact``; the sampler's best is compared with them."""
    criterion: Criterion = "kl"
    """As with ``additive_exact``."""
    seed: NonNegativeInt = 0
    """Of the sampler."""


class ExactOptunaConfig(Section):
    """An Optuna sampler on real validation runs, warm-started from the additive front."""

    solver: Literal["exact_optuna"] = "exact_optuna"
    sampler: Sampler = "tpe"
    """An Optuna sampler."""
    num_trials: PositiveInt = 200
    """Trials per budget, over all workers that share the study."""
    num_warm_start: NonNegativeInt = 16
    """Points of the additive front that are tried first; 0: none."""
    pruner: Literal["none", "median", "wilcoxon"] = "wilcoxon"
    """Stops a trial after part of the samples."""
    study_name: str | None = None
    """Same name and ``storage``: several processes work on one study. ``null``: from the fingerprints."""
    seed: NonNegativeInt = 0
    """Of the sampler."""


class ExhaustiveConfig(Section):
    """Every strategy of a coarse grid by exact KL: ground truth for small spaces."""

    solver: Literal["exhaustive"] = "exhaustive"
    num_levels: int = Field(default=4, ge=2)
    """Levels per parameter, evenly spread."""
    max_strategies: PositiveInt = 20_000
    """A larger grid is an error, before anything runs."""


SolverConfig = Annotated[
    AdditiveExactConfig | AdditiveOptunaConfig | ExactOptunaConfig | ExhaustiveConfig,
    Field(discriminator="solver"),
]
"""One of the solvers; the key ``solver`` says which."""
