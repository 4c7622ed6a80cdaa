"""Optuna on the additive surrogate, and on real validation runs.

Parameters are depth ratios and the number of visual tokens. The budget is an Optuna constraint (for CMA-ES, which
knows none, a penalty); a trial above it is told the surrogate's estimate and never evaluated. Optuna is imported
when a solver runs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dop_search.search.candidates import best_candidates
from dop_search.search.solution import MeasuredSolution, Problem, Solution, uniform_assignment
from dop_search.search.store import FloatArray, OnProgress
from dop_search.strategy.cost.budget import Budget
from dop_search.utils.errors import ConfigError

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial


def additive_optuna(
    problem: Problem,
    budget: Budget,
    sampler: str = "tpe",
    num_trials: int = 1000,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> Solution:
    """An Optuna sampler (``tpe``, ``gp``, ``cmaes``, ``nsga2``, ``random``) on the additive surrogate.

    There for comparison: ``additive_exact`` has the optimum, sooner. The GP fits with torch and CMA-ES needs
    the package ``cmaes``.

    Raises:
        BudgetError: if nothing fits; it names the smallest feasible value.
        ConfigError: on an unknown sampler, or if no trial fits the budget.
    """
    from dop_search.search import optuna_study as plumbing

    start = time.perf_counter()
    surrogate = problem.need_surrogate("additive_optuna")
    limit = _feasible_limit(problem, budget)

    def objective(trial: Trial) -> float:
        assignment = plumbing.suggest(trial, problem.space)
        estimate = surrogate(assignment)
        value = _price(trial, problem, assignment, estimate, limit, plumbing.uses_constraints(sampler))
        if on_progress is not None:
            on_progress(trial.number + 1, num_trials, f"{sampler} on the additive surrogate")
        return estimate if value is None else value

    with plumbing.quiet_optuna():
        study = plumbing.open_study(plumbing.open_storage(None), "additive", "none", {}, None)
        study.sampler = plumbing.make_sampler(sampler, seed)
        study.optimize(objective, n_trials=num_trials)
    history = [_record(trial) for trial in study.get_trials(deepcopy=False)]
    best = _best(history, "kl_additive", sampler)
    return Solution(
        strategy=problem.space.strategy(best["assignment"]),
        assignment=best["assignment"],
        cost_ratio=best["cost_ratio"],
        kl_additive=best["kl_additive"],
        kl_search=None,
        num_validation_runs=0,
        seconds=time.perf_counter() - start,
        solver=f"additive_optuna[{sampler}]",
        history=history,
    )


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
    """Optuna on the exact divergence, warm-started with the surrogate's best candidates and uniform reduction.

    Several processes may share ``storage``: one queues the warm start, all evaluate it, each runs trials until there
    are ``num_trials`` in the whole study, and all return the same solution. What the sampler proposes depends on the
    trials that are finished by then, so the later trials are not those of a single process. Continuing a study (same
    storage and name) repeats no finished trial: a trial lost with its process is queued again, and random numbers
    depend on ``seed`` and the trial's number, not on what is in memory.

    Args:
        problem: needs a surrogate and a store.
        budget: trials above it are not evaluated.
        sampler: ``tpe``, ``gp``, ``cmaes``, ``nsga2`` or ``random``.
        num_trials: trials of the study, the warm start among them.
        seed: of sampler and sample order.
        pruner: ``wilcoxon`` (paired with the best trial), ``median`` or ``none``; over chunks of samples.
        num_chunks: parts that the samples are cut into; the pruner decides after each.
        num_warm_start: candidates of the surrogate to begin with.
        storage: a path (journal file), a database URL, or ``None`` for memory only.
        study_name: of the study in the storage.
        on_progress: called after each trial.

    Raises:
        BudgetError: if nothing fits; it names the smallest feasible value.
        CacheError: if the storage holds another search under that name.
        ConfigError: on an unknown sampler or pruner.
    """
    from dop_search.search import optuna_study as plumbing
    from dop_search.search.sharing import Claims, Pause, end_trial

    start = time.perf_counter()
    limit = _feasible_limit(problem, budget)
    evaluate = _ChunkedEvaluation(problem, pruner, num_chunks, seed)
    facts = {
        "space": [[p.name, p.levels[0], p.full, len(p.levels)] for p in problem.space.parameters],
        "shares": list(problem.space.shares),
        "strategy_fields": dict(problem.space.strategy_fields),
        "budget": [budget.kind, limit],
        "full_cost": problem.cost_model.full_total,
        "num_samples": evaluate.num_samples,
        "samples": problem.need_store("exact_optuna").header,
        "seed": seed,
        "pruner": [pruner, num_chunks],
        "num_warm_start": num_warm_start,
    }

    def objective(trial: Trial) -> float:
        assignment = plumbing.suggest(trial, problem.space)
        estimate = problem.need_surrogate("exact_optuna")(assignment)
        value = _price(trial, problem, assignment, estimate, limit, plumbing.uses_constraints(sampler))
        return evaluate(trial, assignment) if value is None else value

    with plumbing.quiet_optuna():
        opened = plumbing.open_storage(storage)
        study = plumbing.open_study(opened, study_name, pruner, facts, storage)
        plumbing.make_sampler(sampler, seed)  # an unknown name is an error before anything runs

        def queue() -> None:
            chosen = _warm_start(problem, budget, num_warm_start)
            for assignment in chosen:
                parameters = plumbing.trial_parameters(problem.space, assignment)
                study.enqueue_trial(parameters, user_attrs={"warm_start": True}, skip_if_exists=True)
            study.set_user_attr("warm_start", [dict(assignment) for assignment in chosen])

        with Claims(opened, study_name) as claims:
            claims.once("warm start", lambda: "warm_start" in study.user_attrs, queue)
            evaluate.together(study.user_attrs["warm_start"][:num_trials], on_progress)
            pause = Pause()
            while (finished := plumbing.num_trials(study, running=False)) < num_trials:
                plumbing.retry_lost_trials(study, claims.worker)
                if plumbing.num_trials(study, running=True) >= num_trials:
                    pause()  # others are at the last ones
                    continue
                pause = Pause()
                trial = study.ask()
                trial.set_user_attr("process", claims.worker.name)
                place = plumbing.place_among_trials(study, trial.number)
                if place >= num_trials:  # another process was faster
                    end_trial(study, trial.number)
                    continue
                study.sampler = plumbing.make_sampler(sampler, seed, place)
                plumbing.run_trial(study, trial, objective)
                if on_progress is not None:
                    on_progress(min(finished + 1, num_trials), num_trials, f"{sampler} on the exact divergence")
    history = [_record(trial) for trial in study.get_trials(deepcopy=False, states=plumbing.FINISHED)]
    best = _best(history, "kl_search", sampler)
    strategy = problem.space.strategy(best["assignment"])
    per_sample = problem.need_store("exact_optuna").evaluate([strategy])[0]
    return MeasuredSolution(
        strategy=strategy,
        assignment=best["assignment"],
        cost_ratio=best["cost_ratio"],
        kl_additive=best["kl_additive"],
        kl_search=float(per_sample.mean()),
        num_validation_runs=_num_validation_runs(problem, history, evaluate.num_samples),
        seconds=time.perf_counter() - start,
        solver=f"exact_optuna[{sampler}]",
        per_sample_nats=per_sample,
        history=history,
    )


class _ChunkedEvaluation:
    """The exact divergence of a trial, chunk of samples by chunk, until the pruner says stop.

    The warm start is never pruned, so that no answer is worse than it.
    """

    def __init__(self, problem: Problem, pruner: str, num_chunks: int, seed: int) -> None:
        if num_chunks < 1:
            raise ConfigError(f"`num_chunks >= 1` must hold, but got (num_chunks={num_chunks})")
        self._space, self._store = problem.space, problem.need_store("exact_optuna")
        self._pruner = pruner
        self.num_samples = self._store.num_samples
        order = np.random.default_rng(seed).permutation(self.num_samples)  # the data may be sorted by difficulty
        parts = 1 if pruner == "none" else min(num_chunks, self.num_samples)
        self._chunks = [np.sort(part) for part in np.array_split(order, parts)]

    def together(self, assignments: Sequence[Mapping[str, int]], on_progress: OnProgress | None) -> None:
        """Evaluate strategies at once, so that they can share prefixes; the store remembers them."""
        strategies = [self._space.strategy(assignment) for assignment in assignments]
        self._store.evaluate(strategies, on_progress=on_progress, what=f"{len(strategies)} candidates to begin with")

    def __call__(self, trial: Trial, assignment: Mapping[str, int]) -> float:
        """Mean divergence in nats; raises ``optuna.TrialPruned`` on the pruner's word."""
        import optuna

        strategy = self._space.strategy(assignment)
        seen: list[FloatArray] = []
        for step, chunk in enumerate(self._chunks):
            whole = len(chunk) == self.num_samples
            seen.append(self._store.evaluate([strategy], None if whole else chunk.tolist())[0])
            so_far = np.concatenate(seen)
            # Wilcoxon pairs the chunks of two trials; the median pruner compares what is known by then.
            trial.report(float((seen[-1] if self._pruner == "wilcoxon" else so_far).mean()), step)
            may_stop = len(so_far) < self.num_samples and "warm_start" not in trial.user_attrs
            if may_stop and trial.should_prune():
                trial.set_user_attr("measured", {"num_samples": len(so_far)})
                raise optuna.TrialPruned
        mean = float(so_far.mean())
        trial.set_user_attr("measured", {"num_samples": len(so_far), "kl_search": mean})
        return mean


def _price(
    trial: Trial,
    problem: Problem,
    assignment: dict[str, int],
    estimate: float,
    limit: float,
    uses_constraints: bool,
) -> float | None:
    """Note cost and estimate on the trial; what to tell if it is above the budget, ``None`` if it fits."""
    ratio = problem.cost_model.ratio(problem.space.strategy(assignment))
    facts = {"assignment": assignment, "cost_ratio": ratio, "kl_additive": estimate, "fits": ratio <= limit}
    trial.set_user_attr("candidate", facts)
    if uses_constraints:
        trial.set_constraint("cost_ratio", ratio - limit)
        return None if ratio <= limit else estimate
    worst = sum(float(curve.max()) for curve in problem.need_surrogate("optuna").curves.values())
    return None if ratio <= limit else worst + 1.0 + (ratio - limit)


def _feasible_limit(problem: Problem, budget: Budget) -> float:
    """The budget as a ratio, after checking that the cheapest strategy fits."""
    limit = budget.resolve(problem.cost_model)
    cheapest = problem.space.strategy({p.name: p.levels[0] for p in problem.space.parameters})
    ratio = problem.cost_model.ratio(cheapest)
    if ratio > limit:
        raise budget.infeasible(problem.cost_model, ratio)
    return limit


def _warm_start(problem: Problem, budget: Budget, number: int) -> list[Mapping[str, int]]:
    """The surrogate's optimum, uniform reduction, then the other candidates."""
    chosen: list[Mapping[str, int]] = []
    if number > 0:
        chosen += [candidate.assignment for candidate in best_candidates(problem, budget, number)]
    uniform = uniform_assignment(problem, budget)
    return chosen if uniform is None else [*chosen[:1], uniform, *chosen[1:]]


def _record(trial: FrozenTrial) -> dict[str, Any]:
    """A finished trial as a JSON-ready dictionary."""
    known = {**trial.user_attrs.get("candidate", {}), **trial.user_attrs.get("measured", {})}
    return {
        "trial": trial.number,
        "state": trial.state.name,
        **{_OLD_NAMES.get(name, name): value for name, value in known.items()},
    }


_OLD_NAMES = {"divergence_additive": "kl_additive", "divergence_exact": "kl_search"}
"""As storages from before these names were the record's have them."""


def _best(history: list[dict[str, Any]], objective: str, sampler: str) -> dict[str, Any]:
    fitting = [record for record in history if record.get("fits") and objective in record]
    if not fitting:
        raise ConfigError(
            f"none of {len(history)} trials of sampler {sampler!r} fits the budget; raise `num_trials`, "
            "or use solver 'additive_exact'"
        )
    return min(fitting, key=lambda record: (record[objective], record["cost_ratio"]))


def _num_validation_runs(problem: Problem, history: list[dict[str, Any]], num_samples: int) -> int:
    """Distinct strategies evaluated, pruned ones by the part of the samples they got, rounded up."""
    evaluated: dict[str, int] = {}
    for record in history:
        if "num_samples" in record:
            key = problem.space.strategy(record["assignment"]).key()
            evaluated[key] = max(evaluated.get(key, 0), record["num_samples"])
    return -(-sum(evaluated.values()) // num_samples)
