"""Which samples a search should see: how many, whether others give the same, and of what kind.

Three studies, each of which also asks which rule should choose among the surrogate's best candidates:

* ``additive``: the optimum of the sum of curves;
* ``rerank``: the least mean KL on the search samples;
* ``one_se``: the least additive estimate among the candidates whose KL is within one standard error of that
  (the paired difference's, over the search samples);
* ``root``: the least mean square root of KL, which a few samples with a large KL cannot decide.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dop_search.app.results import ResultFile, Row
from dop_search.app.workbench import Workbench
from dop_search.divergence.profiling import MeasuredProfile
from dop_search.search import EvaluationStore
from dop_search.search.additive_exact import additive_exact
from dop_search.search.rerank import rerank_all
from dop_search.search.solution import Solution
from dop_search.strategy import Strategy
from dop_search.strategy.cost import Budget
from dop_search.utils.errors import ConfigError
from dop_search.utils.statistics import crossed_bootstrap_ci95

RULES = ("additive", "rerank", "one_se", "root")


def choose(solutions: Sequence[Solution]) -> dict[str, Solution]:
    """What each of the rules takes of candidates that were evaluated on the same samples."""
    values = np.stack([_samples(solution) for solution in solutions])
    excess = values - values[values.mean(axis=1).argmin()]
    error = excess.std(axis=1, ddof=1) / np.sqrt(values.shape[1])
    alike = [s for s, mean, se in zip(solutions, excess.mean(axis=1), error, strict=True) if mean <= se]
    return {
        "additive": min(solutions, key=_estimate),
        "rerank": solutions[int(values.mean(axis=1).argmin())],
        "one_se": min(alike, key=_estimate),
        "root": solutions[int(np.sqrt(values).mean(axis=1).argmin())],
    }


def on_samples(whole: MeasuredProfile, indices: Sequence[int] | np.ndarray) -> MeasuredProfile:
    """The profile of a search that sees these samples of a larger one (some twice, in a bootstrap).

    Curves are weighed anew from what was measured per sample; exact evaluations go to the larger profile's store.
    Prices stay those of all samples, so that a budget means the same whatever the search sees.
    """
    chosen, store = np.asarray(indices), whole.store

    def evaluate(strategies: Sequence[Strategy], some: Sequence[int] | None = None) -> np.ndarray:
        wanted, place = np.unique(chosen if some is None else chosen[list(some)], return_inverse=True)
        return store.evaluate(strategies, wanted.tolist())[:, place]

    curves = {
        name: replace(curve, per_sample_nats=curve.per_sample_nats[:, chosen])
        for name, curve in whole.curves.curves.items()
    }
    return replace(whole, curves=replace(whole.curves, curves=curves), store=EvaluationStore(evaluate, len(chosen)))


# -- the three studies -----------------------------------------------------------------------------


def validation_size(
    bench: Workbench,
    results: ResultFile,
    sizes: Sequence[int] = (8, 16, 32, 64, 128, 256),
    num_draws: int = 6,
    num_resamples: int = 100,
) -> None:
    """Searches on random subsets of the search samples, scored on the held-out ones.

    Args:
        bench: the model; ``data.num_samples`` is the largest search set, from which smaller ones are drawn.
        results: one row per size and budget.
        sizes: search samples; all of them are one draw, fewer are ``num_draws`` draws without repetition.
        num_draws: random subsets per size.
        num_resamples: bootstrap resamples of the additive optimum per size; 0: none.
    """
    pool = bench.config.data.num_samples
    if not sizes or min(sizes) < 2 or max(sizes) > pool:
        raise ConfigError(
            f"`sizes` must be between 2 and data.num_samples, but got (sizes={list(sizes)}, "
            f"data.num_samples={pool}); set data.num_samples={max(sizes, default=2)}"
        )
    _check_counts(num_draws=num_draws)

    def row(num_samples: int, budget: float) -> tuple[Row, np.ndarray]:
        whole = bench.profile()
        rng = np.random.default_rng([bench.config.seed, num_samples])
        count = 1 if num_samples == pool else num_draws
        draws = [np.sort(rng.permutation(pool)[:num_samples]) for _ in range(count)]
        values, samples = _measure(bench, [on_samples(whole, draw) for draw in draws], budget)
        resamples = [rng.integers(0, pool, num_samples) for _ in range(num_resamples)]
        return {**values, "stability": _stability(whole, resamples, budget)}, samples

    keys = [{"num_samples": size, "budget": budget} for budget in bench.budgets for size in sizes]
    with bench.watch() as notify:
        results.measure(keys, row, notify, "searches on subsets")
    results.sort(keys)
    _compare_rules(results, keys)


def validation_seed(bench: Workbench, results: ResultFile, seeds: Sequence[int] = (0, 1, 2, 3)) -> None:
    """The same search on search samples of other seeds, scored on the same held-out samples.

    Args:
        bench: the model; ``data.num_samples`` search samples of each seed.
        results: one row per seed and budget.
        seeds: of the search samples.

    Raises:
        ConfigError: if another seed's search samples are among the held-out ones, as in a file that is shuffled.
    """
    if len(set(seeds)) < 2 or len(set(seeds)) < len(seeds):
        raise ConfigError(f"`seeds` must be two or more different ones, but got {list(seeds)}; e.g. [0,1,2]")

    def row(seed: int, budget: float) -> tuple[Row, np.ndarray]:
        bench.check_other_seed(seed)
        return _measure(bench, [bench.profile(seed=seed)], budget)

    keys = [{"seed": seed, "budget": budget} for budget in bench.budgets for seed in seeds]
    with bench.watch() as notify:
        results.measure(keys, row, notify, "searches on other samples", group="seed")
    results.sort(keys)
    _compare_rules(results, keys)


def validation_source(bench: Workbench, results: ResultFile, num_draws: int = 12) -> None:
    """Searches on the questions of one family, scored on held-out questions of the same and of all other families.

    Beside each stand searches on as many samples of all families, drawn at random, scored on the same questions. All
    take the additive optimum, which needs no validation run beyond the curves.

    Args:
        bench: the model; the families are those of its search samples.
        results: one row per family and budget.
        num_draws: random sets beside each family.
    """
    families = np.array([sample.family for sample in bench.data("search")])
    asked = np.array([sample.family for sample in bench.data("heldout")])
    names = [name for name in dict.fromkeys(families.tolist()) if (families == name).sum() >= 2]
    if len(names) < 2:
        raise ConfigError(
            f"the search samples have {len(names)} families with two or more samples; raise data.num_samples, or use "
            "a data set of several kinds of question, e.g. data=mixed"
        )
    _check_counts(num_draws=num_draws)

    def row(family: str, budget: float) -> tuple[Row, np.ndarray]:
        whole, limit = bench.profile(), Budget(flops_ratio=budget)
        its = np.flatnonzero(families == family)
        rng = np.random.default_rng([bench.config.seed, names.index(family)])
        draws = [rng.permutation(len(families))[: len(its)] for _ in range(num_draws)]
        chosen = [
            additive_exact(on_samples(whole, indices).problem(limit), limit).strategy for indices in (its, *draws)
        ]
        kl = bench.divergence(chosen)
        own, mixed = kl[0], kl[1:].mean(axis=0)
        values: Row = {
            "num_samples": len(its),
            "strategy": chosen[0].describe(),
            "kl_same_family": float(own[asked == family].mean()) if (asked == family).any() else None,
            "kl_same_family_mixed": float(mixed[asked == family].mean()) if (asked == family).any() else None,
            "kl_others": float(own[asked != family].mean()),
            "kl_others_mixed": float(mixed[asked != family].mean()),
            "difference_ci95": crossed_bootstrap_ci95((own - kl[1:])[:, asked != family], bench.config.seed),
        }
        return values, own

    keys = [{"family": name, "budget": budget} for budget in bench.budgets for name in names]
    with bench.watch() as notify:
        results.measure(keys, row, notify, "searches on one family")
    results.sort(keys)


# -- one row ---------------------------------------------------------------------------------------


def _measure(bench: Workbench, profiles: Sequence[MeasuredProfile], budget: float) -> tuple[Row, np.ndarray]:
    """Search on each profile; mean KL over the searches by rule, and what each rule gains over ``additive``.

    Returns:
        The row's values, and the mean difference to ``additive`` per held-out sample, rule after rule.
    """
    limit = Budget(flops_ratio=budget)
    with bench.watch(f"budget {budget:g}: ") as notify:
        picked = [choose(rerank_all(item.problem(limit), limit, on_progress=notify)) for item in profiles]
    wanted = {choice[rule].strategy.key(): choice[rule].strategy for choice in picked for rule in RULES}
    held = dict(zip(wanted, bench.divergence(list(wanted.values())), strict=True))
    kl = {rule: np.stack([held[choice[rule].strategy.key()] for choice in picked]) for rule in RULES}
    difference = {rule: kl[rule] - kl["additive"] for rule in RULES[1:]}
    values: Row = {"num_draws": len(profiles)}
    values["kl_search"] = {r: float(np.mean([c[r].kl_search for c in picked])) for r in RULES}
    values["kl_heldout"] = {rule: float(kl[rule].mean()) for rule in RULES}
    values["kl_heldout_draws"] = {rule: kl[rule].mean(axis=1) for rule in RULES}
    values["difference_ci95"] = {r: crossed_bootstrap_ci95(d, bench.config.seed) for r, d in difference.items()}
    values["strategies"] = {
        rule: dict(Counter(choice[rule].strategy.describe() for choice in picked).most_common()) for rule in RULES
    }
    return values, np.concatenate([item.mean(axis=0) for item in difference.values()])


def _stability(whole: MeasuredProfile, resamples: Sequence[np.ndarray], budget: float) -> dict[str, Any]:
    """Where the additive optimum of resampled curves lies: 5th, 50th and 95th percentile of every parameter."""
    limit = Budget(flops_ratio=budget)
    optima = [dict(additive_exact(on_samples(whole, i).problem(limit), limit).assignment) for i in resamples]
    found = Counter(tuple(sorted(item.items())) for item in optima)
    return (
        {}
        if not optima
        else {
            **{
                parameter.name: np.percentile([item[parameter.name] for item in optima], (5, 50, 95))
                for parameter in whole.space.parameters
            },
            "num_distinct": len(found),
            "share_of_most_frequent": found.most_common(1)[0][1] / len(optima),
        }
    )


# -- all rows --------------------------------------------------------------------------------------


def _compare_rules(results: ResultFile, keys: Sequence[Mapping[str, Any]]) -> None:
    """Per budget, over all its rows: mean held-out KL by rule and the 95 % interval of the difference to ``additive``.

    The interval resamples rows and held-out samples; draws within a row are averaged first.
    """
    summary: dict[str, Any] = {}
    for budget in dict.fromkeys(key["budget"] for key in keys):
        its = [key for key in keys if key["budget"] == budget]
        rows = [row for row in map(results.find, its) if row is not None and "kl_heldout" in row]
        samples = [item for item in map(results.per_sample, its) if item is not None]
        if not rows or len(samples) < len(rows):
            continue
        by_rule = np.stack(samples).reshape(len(samples), len(RULES) - 1, -1)
        summary[f"{budget:g}"] = {
            "kl_heldout": {rule: float(np.mean([row["kl_heldout"][rule] for row in rows])) for rule in RULES},
            "difference": {rule: float(by_rule[:, i].mean()) for i, rule in enumerate(RULES[1:])},
            "difference_ci95": {rule: crossed_bootstrap_ci95(by_rule[:, i]) for i, rule in enumerate(RULES[1:])},
        }
    if summary:
        results.summarize(summary)


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ConfigError(f"`{name} >= 1` must hold, but got ({name}={value})")


def _samples(solution: Solution) -> np.ndarray:
    assert solution.per_sample_nats is not None
    return solution.per_sample_nats


def _estimate(solution: Solution) -> tuple[float, float]:
    assert solution.kl_additive is not None
    return solution.kl_additive, solution.cost_ratio
