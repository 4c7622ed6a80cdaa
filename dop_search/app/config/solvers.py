"""What can be configured of the solvers, and what a search does with it: one section each, distinguished by ``solver``.

A solver of one's own needs no section: its options are its keyword arguments.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveInt,
    Tag,
    field_validator,
    model_validator,
)

from dop_search.app.config.section import Section
from dop_search.utils.errors import ConfigError
from dop_search.utils.registry import did_you_mean

if TYPE_CHECKING:  # importing the configuration imports no SciPy
    from dop_search.search import Decide, MeasuredSolution, OnProgress, Option, Problem, Solution
    from dop_search.strategy.cost import Budget

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


@dataclass(frozen=True)
class SearchPlace:
    """What a solver has beside its options, and what its trials are kept under.

    Attributes:
        problem, budget: what to solve.
        on_progress: told how far it is.
        model: its name.
        teacher: fingerprint of the full model's answers.
        averaging: of the KL over answer positions.
        storage: that several processes share, if any.
        cache_dir: where trials are kept otherwise.
        options: makes the choices of ``search=joint``.
        decide: measures strategies on the samples that decide among the last few of ``search=joint``.
        also: further selectors and spaces of ``search=joint``.
        studies: a search adds the storage and the name of its study.
    """

    problem: Problem
    budget: Budget
    on_progress: OnProgress
    model: str
    teacher: str
    averaging: str
    storage: str | None
    cache_dir: Path
    options: Callable[[], list[Option]]
    decide: Decide | None
    also: Sequence[Sequence[str]]
    studies: list[tuple[str, str]] = field(default_factory=list)

    def solve(self, solver: str, **options: Any) -> Solution:
        """The solution of a solver by name."""
        from dop_search.search import solve

        return solve(solver, self.problem, self.budget, on_progress=self.on_progress, **options)


class SolverSection(Section):
    """A solver with its options."""

    solver: str

    def candidates(self, place: SearchPlace) -> list[MeasuredSolution]:
        """The solver's solution, with its exact KL, and what it was compared with; the best first."""
        from dop_search.search import with_exact

        return with_exact(place.problem, place.solve(self.solver, **self.model_dump(exclude={"solver"})))


class AdditiveExactConfig(SolverSection):
    """The provable optimum of the additive surrogate, then the best few by exact KL."""

    solver: Literal["additive_exact"] = "additive_exact"
    num_rerank: PositiveInt = 16
    """Candidates near the additive optimum whose exact KL decides (uniform reduction is always among them)."""

    def candidates(self, place: SearchPlace) -> list[MeasuredSolution]:
        """See base class."""
        from dop_search.search import rerank_all

        return rerank_all(place.problem, place.budget, self.num_rerank, on_progress=place.on_progress)


class AdditiveOptunaConfig(SolverSection):
    """An Optuna sampler on the additive surrogate."""

    solver: Literal["additive_optuna"] = "additive_optuna"
    sampler: Sampler = "tpe"
    """An Optuna sampler."""
    num_trials: PositiveInt = 2000
    """Trials per budget; each takes no validation run."""
    num_rerank: PositiveInt = 16
    """As with ``additive_exact``; the sampler's best is compared with them."""
    seed: NonNegativeInt = 0
    """Of the sampler."""

    def candidates(self, place: SearchPlace) -> list[MeasuredSolution]:
        """See base class; the sampler's best is sorted among those of ``additive_exact``."""
        from dop_search.search import with_exact

        found = place.solve(self.solver, **self.model_dump(include={"sampler", "num_trials", "seed"}))
        ranked = AdditiveExactConfig(num_rerank=self.num_rerank).candidates(place)
        return with_exact(place.problem, found, ranked)


class ExactOptunaConfig(SolverSection):
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
    """Same name and ``storage``: several processes work on one study. ``null``: of model, space, sampler, budget and a
    digest of what else makes it another study, e.g. ``pocket-dop_split-tpe-flops0.3-1f2e3d4c``."""
    seed: NonNegativeInt = 0
    """Of the sampler."""

    def candidates(self, place: SearchPlace) -> list[MeasuredSolution]:
        """See base class."""
        from dop_search.search import with_exact

        where = _study(self, place.problem.space.name, place, "num_trials")
        return with_exact(place.problem, place.solve(self.solver, **self.model_dump(exclude={"solver"}) | where))


def _study(config: ExactOptunaConfig | JointConfig, what: str, place: SearchPlace, *more: str) -> dict[str, Any]:
    """Where a search's study is kept, and its name: for a reader, and a digest of what makes it another one.

    ``more``: options with which it is the same study: more trials, another choice among those that there are.
    """
    budget, shares = place.budget, place.problem.space.shares
    readable = "-".join([re.sub(r"[^\w.]+", "-", place.model).strip("-"), what, config.sampler])
    others = [place.teacher, config.model_dump(exclude={*more, "study_name"}), shares, place.averaging]
    others += [place.also] if what == "joint" else []
    digest = "-" + hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()[:8]
    name, digest = (config.study_name, "") if config.study_name else (readable, digest)
    where = {
        "storage": place.storage or str(place.cache_dir / f"study-{name}{digest}.journal"),
        "study_name": f"{name}-{budget.name.removesuffix('_ratio')}{budget.value:g}{digest}",
    }
    place.studies.append((where["storage"], where["study_name"]))
    return where


class JointConfig(SolverSection):
    """One Optuna study that chooses selector (``selector.also``) and space (``space.also``), too."""

    solver: Literal["joint"] = "joint"
    num_proposals: PositiveInt = 24
    """Strategies that the surrogates propose, filled up to the budget, uniform reductions and GSOP's points among
    them."""
    num_sampled: NonNegativeInt = 0
    """Trials of the sampler after these; 0: none."""
    num_finalists: PositiveInt = 8
    """Strategies with the least KL, among which ``data.num_decision`` further samples decide."""
    sampler: Sampler = "tpe"
    """An Optuna sampler."""
    pruner: Literal["none", "median", "wilcoxon"] = "wilcoxon"
    """Stops a sampled trial after part of the samples."""
    study_name: str | None = None
    """As with ``exact_optuna``."""
    seed: NonNegativeInt = 0
    """Of the sampler."""

    def candidates(self, place: SearchPlace) -> list[MeasuredSolution]:
        """See base class."""
        from dop_search.search import joint_search

        where = _study(self, "joint", place, "num_sampled", "num_finalists")
        options = self.model_dump(exclude={"solver", "study_name"}) | where
        return joint_search(place.options(), decide=place.decide, on_progress=place.on_progress, **options)


class ExhaustiveConfig(SolverSection):
    """Every strategy of a coarse grid by exact KL: ground truth for small spaces."""

    solver: Literal["exhaustive"] = "exhaustive"
    num_levels: int = Field(default=4, ge=2)
    """Levels per parameter, evenly spread."""
    max_strategies: PositiveInt = 20_000
    """A larger grid is an error, before anything runs."""


class OwnSolverConfig(SolverSection):
    """A solver that is registered by a module of ``imports``; its options are those of its function."""

    model_config = ConfigDict(extra="allow")

    solver: str
    """Its name in ``dop_search.search.SOLVERS``."""

    @field_validator("solver")
    @classmethod
    def _is_known(cls, value: str) -> str:
        from dop_search.search import SOLVERS

        if value not in SOLVERS:
            near = did_you_mean(value, SOLVERS)
            raise ValueError(f"must be one of {', '.join(SOLVERS)}, but got {value!r}; {near}".rstrip("; "))
        return value

    @model_validator(mode="after")
    def _has_the_options(self) -> OwnSolverConfig:
        from dop_search.search.registry import check_solver_options

        try:
            check_solver_options(self.solver, self.model_extra or {})
        except ConfigError as error:
            raise ValueError(f"{error}; `search=own` brings no options of other solvers") from error
        return self


_SECTIONS = (AdditiveExactConfig, AdditiveOptunaConfig, ExactOptunaConfig, JointConfig, ExhaustiveConfig)
OWN = "own"
"""The tag of all solvers without a section of their own."""


def _section(value: Any) -> str:
    """Which section a mapping, or a section, is: that of its solver, or the one for all others."""
    name = str(value.get("solver") if isinstance(value, dict) else getattr(value, "solver", None))
    return name if name in {section.model_fields["solver"].default for section in _SECTIONS} else OWN


SolverConfig = Annotated[
    Annotated[AdditiveExactConfig, Tag("additive_exact")]
    | Annotated[AdditiveOptunaConfig, Tag("additive_optuna")]
    | Annotated[ExactOptunaConfig, Tag("exact_optuna")]
    | Annotated[JointConfig, Tag("joint")]
    | Annotated[ExhaustiveConfig, Tag("exhaustive")]
    | Annotated[OwnSolverConfig, Tag(OWN)],
    Discriminator(_section),
]
"""One of the solvers; the key ``solver`` says which."""
