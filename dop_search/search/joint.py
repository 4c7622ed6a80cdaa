"""One Optuna study over selectors and spaces: the surrogate proposes, exact validation runs decide.

Parameters, define-by-run: ``selector`` and ``space`` as categories where there are several, then that space's depth
ratios and number of visual tokens. The additive surrogate of every selector and space has its exact front; its best
points, uniform reduction and GSOP's trajectory (a space of its own, :class:`TrajectorySpace`) are enqueued and
measured, then a sampler goes on for a few trials, if asked for; a separate draw of samples decides among the last few.
Cost is a constraint; what a selector itself computes is taken off the budget before (:attr:`Option.budget`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dop_search.search.options import Option
from dop_search.search.optuna_solvers import best_record, price, record_of
from dop_search.search.solution import MeasuredSolution, Problem
from dop_search.search.store import FloatArray, OnProgress
from dop_search.strategy import Strategy
from dop_search.strategy.cost.budget import Budget
from dop_search.utils.errors import BudgetError, ConfigError

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.trial import Trial

WARM_START = "warm_start"
DECISION = "decision"
NUM_FINALISTS = 8
Decide = Callable[[Sequence[Strategy]], FloatArray]
"""Divergences in nats on samples that nothing was proposed or measured on, ``[num_strategies, num_other_samples]``."""
log = logging.getLogger(__name__)


def joint_search(
    options: Sequence[Option],
    num_proposals: int = 24,
    num_sampled: int = 0,
    num_trials: int | None = None,
    decide: Decide | None = None,
    num_finalists: int = NUM_FINALISTS,
    use_up: bool = True,
    sampler: str = "tpe",
    seed: int = 0,
    pruner: str = "wilcoxon",
    num_chunks: int = 16,
    storage: str | Path | None = None,
    study_name: str = "dop_search",
    on_progress: OnProgress | None = None,
) -> list[MeasuredSolution]:
    """Every strategy within the budget that was measured on all samples, the one with the least mean KL first; with
    ``decide`` the finalists first, by their mean there.

    Several processes may share ``storage``: all evaluate the proposals, each runs trials until there are enough in the
    whole study, and all return the same solutions. What the sampler proposes depends on the trials that are finished by
    then, so the later trials are not those of a single process. Continuing a study (same storage and name) repeats no
    finished trial: one that is lost with its process is begun again in its place, and random numbers depend on ``seed``
    and the place, not on what is in memory.

    Args:
        options: selectors with spaces; those in which nothing fits are left out.
        num_proposals: strategies that the surrogates propose: each one's best, uniform reductions, then the best of
            all by their estimates.
        num_sampled: trials of the sampler after them.
        num_trials: of the whole study instead, proposals among them.
        decide: measures the finalists on other samples; ``None``: the search samples decide.
        num_finalists: strategies with the least KL that ``decide`` chooses among.
        use_up: raise what a proposal leaves of the budget, see :func:`filled`.
        sampler: ``tpe``, ``gp``, ``cmaes``, ``nsga2`` or ``random``.
        seed: of sampler and sample order.
        pruner: ``wilcoxon`` (paired with the best trial), ``median`` or ``none``; over chunks of samples.
        num_chunks: parts that the samples are cut into; the pruner decides after each.
        storage: a path (journal file), a database URL, or ``None`` for memory only.
        study_name: of the study in the storage.
        on_progress: called after each trial.

    Raises:
        BudgetError: if nothing fits; it names the smallest feasible value.
        CacheError: if the storage holds another search under that name.
        ConfigError: on an unknown sampler or pruner.
    """
    from dop_search.search import optuna_study as plumbing
    from dop_search.search.sharing import Claims

    start = time.perf_counter()
    choice = _Choice(_feasible(options))
    evaluate = _ChunkedEvaluation(choice, pruner, num_chunks, seed)
    facts = choice.facts() | {"seed": seed, "pruner": [pruner, num_chunks], "num_warm_start": num_proposals}

    def objective(trial: Trial) -> float:
        option, assignment = choice.suggest(trial)
        estimate = option.problem.need_surrogate("exact_optuna")(assignment)
        constrained = plumbing.uses_constraints(sampler)
        ratio = option.price(option.problem.space.strategy(assignment))
        value = price(trial, option.problem, assignment, ratio, estimate, option.most, constrained)
        return evaluate(trial, option, assignment) if value is None else value

    with plumbing.quiet_optuna():
        opened = plumbing.open_storage(storage)
        study = plumbing.open_study(opened, study_name, pruner, facts, storage)
        plumbing.make_sampler(sampler, seed)  # an unknown name is an error before anything runs

        def choose() -> None:
            chosen = choice.proposals(num_proposals, use_up)
            indices = {id(option): index for index, option in enumerate(choice.options)}
            study.set_user_attr(WARM_START, [[indices[id(option)], dict(item)] for option, item in chosen])

        with Claims(plumbing.open_storage(storage, bookkeeping=True), study_name) as claims:
            claims.once("warm start", lambda: WARM_START in study.user_attrs, choose)
            queued = [(choice.options[index], item) for index, item in study.user_attrs[WARM_START]]
            total = len(queued) + num_sampled if num_trials is None else num_trials
            if num_trials is not None and num_trials <= len(queued):
                log.warning(
                    f"num_trials={num_trials} are all taken by the {len(queued)} candidates to begin with, so that the "
                    f"sampler {sampler} proposes none; raise num_trials, or lower num_warm_start"
                )
            evaluate.together(queued[:total], on_progress)
            starts = [choice.parameters(option, assignment) for option, assignment in queued]

            def notify(num_done: int) -> None:
                if on_progress is not None:
                    on_progress(num_done, total, f"{sampler} on the exact divergence")

            def draw(place: int) -> BaseSampler:
                return plumbing.make_sampler(sampler, seed, place)

            plumbing.run_trials(study, opened, claims.worker, total, draw, starts, objective, notify)
    trials = plumbing.finished(study)
    history = [record_of(trial) | {"trial": place} | choice.label(trial.params) for place, trial in trials.items()]
    evaluate.count(choice, history)
    best_record(history, "kl_search", sampler)  # or none fits
    ranked = _solutions(choice, history, evaluate.num_samples, f"exact_optuna[{sampler}]", time.perf_counter() - start)
    if decide is not None and min(num_finalists, len(ranked)) > 1:
        ranked = _decided(ranked, decide, num_finalists)
        study.set_user_attr(DECISION, [[its.strategy.describe(), its.kl_decision] for its in ranked[:num_finalists]])
    return ranked


def exact_optuna(
    problem: Problem,
    budget: Budget,
    sampler: str = "tpe",
    num_trials: int = 100,
    seed: int = 0,
    pruner: str = "wilcoxon",
    num_chunks: int = 16,
    num_warm_start: int = 16,
    storage: str | Path | None = None,
    study_name: str = "dop_search",
    on_progress: OnProgress | None = None,
) -> MeasuredSolution:
    """Optuna on the exact divergence of one space: :func:`joint_search` with ``num_trials`` in the whole study.

    ``num_warm_start`` candidates of the surrogate and uniform reduction are among them.
    """
    return joint_search(
        [Option(str(problem.space.strategy_fields.get("selector", "")), problem.space.name, problem, budget)],
        num_warm_start,
        num_trials=num_trials,
        use_up=False,
        sampler=sampler,
        seed=seed,
        pruner=pruner,
        num_chunks=num_chunks,
        storage=storage,
        study_name=study_name,
        on_progress=on_progress,
    )[0]


def _feasible(options: Sequence[Option]) -> list[Option]:
    found: list[Option] = []
    errors: list[BudgetError] = []
    for option in options:
        try:
            option.limit  # noqa: B018 (raises)
        except BudgetError as error:
            errors.append(error)
        else:
            found.append(option)
    if not found:
        raise errors[0] if errors else ConfigError("a search needs a selector and a space, but got none")
    return found


class _Choice:
    """The options as parameters of trials: a category exists where there are several of its kind."""

    def __init__(self, options: Sequence[Option]) -> None:
        self.options = list(options)
        self._kinds = {
            name: list(dict.fromkeys(getattr(option, name) for option in options)) for name in ("selector", "space")
        }
        self._kinds = {name: values for name, values in self._kinds.items() if len(values) > 1}

    def facts(self) -> dict[str, Any]:
        if len(self.options) == 1:
            return self.options[0].facts()
        return {"options": [[option.selector, option.space, option.facts()] for option in self.options]}

    def label(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The categories among the parameters of a trial."""
        return {name: parameters[name] for name in self._kinds if name in parameters}

    def of(self, label: Mapping[str, Any]) -> Option | None:
        return next((o for o in self.options if all(getattr(o, k) == v for k, v in label.items())), None)

    def suggest(self, trial: Trial) -> tuple[Option, dict[str, int]]:
        import optuna

        from dop_search.search.optuna_study import suggest

        option = self.of({name: trial.suggest_categorical(name, values) for name, values in self._kinds.items()})
        if option is None:  # a selector that leaves too little for this space
            raise optuna.TrialPruned
        return option, suggest(trial, option.problem.space)

    def parameters(self, option: Option, assignment: Mapping[str, int]) -> dict[str, Any]:
        """The inverse of :meth:`suggest`."""
        from dop_search.search.optuna_study import trial_parameters

        its = {name: getattr(option, name) for name in self._kinds}
        return its | trial_parameters(option.problem.space, assignment)

    def proposals(self, number: int, use_up: bool) -> list[tuple[Option, Mapping[str, int]]]:
        """Each option's best and its uniform reduction, then the best of the rest by estimate, ``number`` in all."""
        first: list[tuple[Option, Mapping[str, int]]] = []
        rest: list[tuple[float, int, Option, Mapping[str, int]]] = []
        seen: set[str] = set()
        for option in self.options:
            surrogate = option.problem.need_surrogate("exact_optuna")
            for place, assignment in enumerate(option.proposals(number, use_up)):
                key = option.problem.space.strategy(assignment).key()  # uniform reduction is in every space
                if key in seen:
                    continue
                seen.add(key)
                if place < 2:
                    first.append((option, assignment))
                else:
                    rest.append((surrogate(assignment), len(rest), option, assignment))
        if len(self.options) > 1:
            rest = sorted(rest, key=lambda item: item[:2])[: max(0, number - len(first))]
        return [*first, *((option, assignment) for _, _, option, assignment in rest)]


class _ChunkedEvaluation:
    """The exact divergence of a trial, chunk of samples by chunk, until the pruner says stop.

    The warm start is never pruned, so that no answer is worse than it.
    """

    def __init__(self, choice: _Choice, pruner: str, num_chunks: int, seed: int) -> None:
        if num_chunks < 1:
            raise ConfigError(f"`num_chunks >= 1` must hold, but got (num_chunks={num_chunks})")
        self._pruner = pruner
        self.num_samples = choice.options[0].problem.need_store("exact_optuna").num_samples
        order = np.random.default_rng(seed).permutation(self.num_samples)  # the data may be sorted by difficulty
        parts = 1 if pruner == "none" else min(num_chunks, self.num_samples)
        self._chunks = [np.sort(part) for part in np.array_split(order, parts)]

    def together(self, chosen: Sequence[tuple[Option, Mapping[str, int]]], on_progress: OnProgress | None) -> None:
        """Evaluate strategies at once, so that they can share prefixes; the stores remember them."""
        for option in {id(option): option for option, _ in chosen}.values():
            space = option.problem.space
            strategies = [space.strategy(assignment) for its, assignment in chosen if its is option]
            what = f"{len(strategies)} candidates to begin with"
            option.problem.need_store("exact_optuna").evaluate(strategies, on_progress=on_progress, what=what)

    def count(self, choice: _Choice, history: Sequence[Mapping[str, Any]]) -> None:
        """Let the stores count the runs of finished trials, also of other processes and before an interruption."""
        order = np.concatenate(self._chunks)
        for record in history:
            if "num_samples" in record:
                option, strategy = _strategy(choice, record)
                option.problem.need_store("exact_optuna").count(strategy, order[: record["num_samples"]])

    def __call__(self, trial: Trial, option: Option, assignment: Mapping[str, int]) -> float:
        """Mean divergence in nats; raises ``optuna.TrialPruned`` on the pruner's word."""
        import optuna

        strategy, store = option.problem.space.strategy(assignment), option.problem.need_store("exact_optuna")
        seen: list[FloatArray] = []
        for step, chunk in enumerate(self._chunks):
            whole = len(chunk) == self.num_samples
            seen.append(store.evaluate([strategy], None if whole else chunk.tolist())[0])
            so_far = np.concatenate(seen)
            # Wilcoxon pairs the chunks of two trials; the median pruner compares what is known by then.
            trial.report(float((seen[-1] if self._pruner == "wilcoxon" else so_far).mean()), step)
            may_stop = len(so_far) < self.num_samples and WARM_START not in trial.user_attrs
            if may_stop and trial.should_prune():
                trial.set_user_attr("measured", {"num_samples": len(so_far)})
                raise optuna.TrialPruned
        mean = float(so_far.mean())
        trial.set_user_attr("measured", {"num_samples": len(so_far), "kl_search": mean})
        return mean


def _solutions(
    choice: _Choice, history: list[dict[str, Any]], num_samples: int, solver: str, seconds: float
) -> list[MeasuredSolution]:
    runs = _num_validation_runs(choice, history, num_samples) + sum(option.num_runs for option in choice.options)
    found: dict[str, MeasuredSolution] = {}
    for record in sorted(
        (item for item in history if item.get("fits") and "kl_search" in item),
        key=lambda item: (item["kl_search"], item["cost_ratio"]),
    ):
        option, strategy = _strategy(choice, record)
        if strategy.key() in found:
            continue
        (row,) = option.problem.need_store("exact_optuna").evaluate([strategy])
        found[strategy.key()] = MeasuredSolution(
            strategy=strategy,
            assignment=record["assignment"],
            cost_ratio=record["cost_ratio"],
            kl_additive=record["kl_additive"],
            kl_search=float(row.mean()),
            num_validation_runs=runs,
            seconds=seconds,
            solver=solver,
            per_sample_nats=row,
        )
    ranked = list(found.values())
    return [replace(ranked[0], history=history), *ranked[1:]]


def _decided(ranked: list[MeasuredSolution], decide: Decide, number: int) -> list[MeasuredSolution]:
    """The first ``number`` by their mean on other samples, then the rest."""
    strategies = [solution.strategy for solution in ranked[:number]]
    means = decide(strategies).mean(axis=1).tolist()
    order = sorted(range(len(means)), key=lambda place: (means[place], ranked[place].cost_ratio))
    finalists = [replace(ranked[place], kl_decision=float(means[place])) for place in order]
    return [replace(finalists[0], history=ranked[0].history), *finalists[1:], *ranked[number:]]


def _strategy(choice: _Choice, record: Mapping[str, Any]) -> tuple[Option, Strategy]:
    option = choice.of(choice.label(record)) or choice.options[0]
    return option, option.problem.space.strategy(record["assignment"])


def _num_validation_runs(choice: _Choice, history: list[dict[str, Any]], num_samples: int) -> int:
    """Distinct strategies evaluated, pruned ones by the part of the samples they got, rounded up."""
    evaluated: dict[str, int] = {}
    for record in history:
        if "num_samples" in record:
            key = _strategy(choice, record)[1].key()
            evaluated[key] = max(evaluated.get(key, 0), record["num_samples"])
    return -(-sum(evaluated.values()) // num_samples)
