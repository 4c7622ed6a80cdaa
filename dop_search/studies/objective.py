"""Which measure of a strategy on the search samples foretells its held-out KL and its accuracy.

Measured on the same strategies, ranked by each objective, and compared with what they do on new samples: by Spearman's
rank correlation, and by the strategy that each objective would choose within a budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dop_search.app.results import ResultFile, Row
from dop_search.app.workbench import Workbench
from dop_search.data.validation import Split
from dop_search.divergence import kl_divergence
from dop_search.evaluation import correct_answers
from dop_search.search import Problem
from dop_search.search.candidates import best_candidates
from dop_search.search.solution import fill_tokens
from dop_search.strategy import Strategy
from dop_search.strategy.cost import Budget
from dop_search.utils.errors import ConfigError
from dop_search.utils.statistics import spearman

MEASURED = ("kl", "reverse_kl", "js", "logit_mse", "changed")
"""Measured per sample, mean over its answer positions; ``changed``: another top token."""
PARTS = (*MEASURED, "wrong")
"""… and whether the strategy's answer is not right."""
TRIMMED_SHARE = 0.1
CLIP_NATS = 1.0
NUM_RESAMPLES = 400


def distances(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``[num_positions, len(MEASURED)]`` of two log-probabilities ``[num_positions, vocab_size]``.

    ``logit_mse`` is between logits less their mean over the vocabulary, as a constant changes no probability.
    """
    mixed = torch.logaddexp(log_p, log_q) - np.log(2.0)
    centred = (log_p - log_p.mean(dim=-1, keepdim=True)) - (log_q - log_q.mean(dim=-1, keepdim=True))
    values = {
        "kl": kl_divergence(log_p, log_q),
        "reverse_kl": kl_divergence(log_q, log_p),
        "js": 0.5 * (kl_divergence(log_p, mixed) + kl_divergence(log_q, mixed)),
        "logit_mse": centred.square().mean(dim=-1),
        "changed": (log_p.argmax(dim=-1) != log_q.argmax(dim=-1)).float(),
    }
    return torch.stack([values[name] for name in MEASURED], dim=-1)


def score(values: np.ndarray, families: np.ndarray) -> dict[str, np.ndarray]:
    """Every objective of ``values [strategies, samples, len(PARTS)]``: ``[strategies]``, less is better."""
    part = dict(zip(PARTS, np.moveaxis(values, 2, 0), strict=True))
    kl = part["kl"]
    kept = max(1, round((1.0 - TRIMMED_SHARE) * kl.shape[1]))
    by_family = [kl[:, families == name].mean(axis=1) for name in np.unique(families)]
    return {
        "kl": kl.mean(axis=1),
        "reverse_kl": part["reverse_kl"].mean(axis=1),
        "js": part["js"].mean(axis=1),
        "logit_mse": part["logit_mse"].mean(axis=1),
        "top1_changed": part["changed"].mean(axis=1),
        "answer_changed": (part["changed"] > 0.0).mean(axis=1),
        "wrong": part["wrong"].mean(axis=1),
        "root_kl": np.sqrt(kl).mean(axis=1),
        "trimmed_kl": np.sort(kl, axis=1)[:, :kept].mean(axis=1),
        "clipped_kl": np.minimum(kl, CLIP_NATS).mean(axis=1),
        "worst_family_kl": np.max(by_family, axis=0),
    }


def objective(bench: Workbench, results: ResultFile, num_good: int = 10, num_random: int = 10) -> None:
    """Measure strategies of every budget by every objective.

    An answer counts as right if the full model's is and the strategy's is the same: teacher-forced on the full model's
    answer, every top token is. What the full model gets wrong counts as wrong.

    Args:
        bench: the model and its samples.
        results: one row per strategy.
        num_good: of the surrogate's best candidates, per budget; where there are fewer, random ones take their place.
        num_random: strategies of random depths with as many visual tokens as fit, per budget.
    """
    if num_good < 1 or num_random < 0 or num_good + num_random < 3:
        raise ConfigError(
            "`num_good >= 1`, `num_random >= 0` and three strategies per budget are needed for a rank correlation, "
            f"but got (num_good={num_good}, num_random={num_random})"
        )
    names = [*(f"good {i}" for i in range(num_good)), *(f"random {i}" for i in range(num_random))]

    @cache
    def measured(budget: float) -> tuple[list[Strategy], np.ndarray]:
        limit = Budget(flops_ratio=budget)
        problem = bench.profile().problem(limit)
        good = [problem.space.strategy(c.assignment) for c in best_candidates(problem, limit, num_good)]
        rng = np.random.default_rng([bench.config.seed, round(budget * 1e6)])
        chosen = good + _random_strategies(problem, limit, len(names) - len(good), rng)
        search, heldout, test = (_parts(bench, chosen, split) for split in ("search", "heldout", "test"))
        columns = [search.reshape(len(chosen), -1), heldout[:, :, PARTS.index("kl")], test[:, :, PARTS.index("wrong")]]
        return chosen, np.concatenate(columns, axis=1)

    def row(budget: float, candidate: str) -> tuple[Row, np.ndarray]:
        strategies, samples = measured(budget)
        index = names.index(candidate)
        search, heldout, wrong = _unpack(bench, samples[[index]])
        scores = {name: float(value[0]) for name, value in score(search, _families(bench)).items()}
        found: Row = {"strategy": strategies[index].describe(), "objective": scores}
        return {**found, "kl_heldout": float(heldout.mean()), "accuracy": float(1.0 - wrong.mean())}, samples[index]

    keys = [{"budget": budget, "candidate": name} for budget in bench.budgets for name in names]
    with bench.watch() as notify:
        results.measure(keys, row, notify, "strategies by every objective", group="budget")
    results.sort(keys)
    known = [(key["budget"], samples) for key in keys if (samples := results.per_sample(key)) is not None]
    if known:
        budgets, values = np.array([budget for budget, _ in known]), np.stack([samples for _, samples in known])
        results.summarize(summarize(budgets, *_unpack(bench, values), _families(bench)))


def _random_strategies(problem: Problem, limit: Budget, count: int, rng: np.random.Generator) -> list[Strategy]:
    found: dict[str, Strategy] = {}
    depths = [parameter for parameter in problem.space.parameters if parameter.role != "tokens"]
    for _ in range(1000 * max(count, 1)):
        if len(found) == count:
            break
        filled = fill_tokens(problem, limit, {item.name: int(rng.choice(item.levels)) for item in depths})
        if filled is not None:
            strategy = problem.space.strategy(filled)
            found[strategy.key()] = strategy
    return list(found.values())


def _parts(bench: Workbench, strategies: Sequence[Strategy], split: Split) -> np.ndarray:
    """``[strategies, samples, len(PARTS)]``."""
    values = bench.distances(strategies, split, distances)
    right = correct_answers(bench.full_answers(split), bench.data(split).samples)
    wrong = (values[:, :, MEASURED.index("changed")] > 0.0) | ~right
    return np.concatenate([values, wrong[..., None]], axis=2)


def _unpack(bench: Workbench, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Parts on the search samples, KL on the held-out ones, wrong answers on the test ones, of saved rows."""
    sizes = [len(bench.data("search")) * len(PARTS), len(bench.data("heldout"))]
    search, heldout, wrong = np.split(rows, np.cumsum(sizes), axis=1)
    return search.reshape(len(rows), -1, len(PARTS)), heldout, wrong


def _families(bench: Workbench) -> np.ndarray:
    return np.array([sample.family for sample in bench.data("search")])


def summarize(
    budgets: np.ndarray, search: np.ndarray, heldout: np.ndarray, wrong: np.ndarray, families: np.ndarray
) -> dict[str, Any]:
    """What each objective foretells.

    Args:
        budgets: of each strategy ``[strategies]``.
        search: ``[strategies, search samples, len(PARTS)]``.
        heldout: KL ``[strategies, held-out samples]``.
        wrong: answers ``[strategies, test samples]``.
        families: of the search samples.

    Returns:
        Per objective: Spearman's correlation with held-out KL and with the share of wrong answers, mean over the
        budgets (``…_kl``, ``…_accuracy``) and over all strategies (``overall_…``); 95 % intervals when search, held-out
        and test samples are resampled, also of the difference to the objective ``kl``; and ``chosen``, per budget what
        the objective's best strategy does on new samples.
    """
    scores = score(search, families)
    rng = np.random.default_rng(0)
    samples: list[dict[str, np.ndarray]] = []
    for _ in range(NUM_RESAMPLES):
        s, h, w = (rng.integers(0, size, size) for size in (search.shape[1], heldout.shape[1], wrong.shape[1]))
        again = score(search[:, s], families[s])
        samples.append(_correlations(budgets, again, heldout[:, h].mean(axis=1), wrong[:, w].mean(axis=1)))
    values = _correlations(budgets, scores, heldout.mean(axis=1), wrong.mean(axis=1))
    summary: dict[str, Any] = {}
    for name in scores:
        resampled = np.stack([item[name] for item in samples])
        against = resampled - np.stack([item["kl"] for item in samples])
        summary[name] = {
            target: {
                "spearman": float(values[name][index]),
                "ci95": np.percentile(resampled[:, index], (2.5, 97.5)),
                "minus_kl_ci95": np.percentile(against[:, index], (2.5, 97.5)),
            }
            for index, target in enumerate(("kl", "accuracy", "overall_kl", "overall_accuracy"))
        }
        chosen = {}
        for budget in np.unique(budgets):
            its = np.flatnonzero(budgets == budget)
            best = its[scores[name][its].argmin()]
            ties = int((scores[name][its] == scores[name][best]).sum())
            chosen[f"{budget:g}"] = {
                "kl_heldout": float(heldout[best].mean()),
                "accuracy": float(1.0 - wrong[best].mean()),
                "num_ties": ties,
            }
        summary[name]["chosen"] = chosen
    return summary


def _correlations(
    budgets: np.ndarray, scores: Mapping[str, np.ndarray], kl: np.ndarray, wrong: np.ndarray
) -> dict[str, np.ndarray]:
    """Per objective Spearman with KL and with wrong answers: mean over the budgets, then over all strategies."""
    found = {}
    for name, values in scores.items():
        within = [
            [_spearman(values[budgets == b], target[budgets == b]) for target in (kl, wrong)]
            for b in np.unique(budgets)
        ]
        found[name] = np.array([*np.mean(within, axis=0), _spearman(values, kl), _spearman(values, wrong)])
    return found


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    """0 where one side is constant, as an objective that tells nothing apart foretells nothing."""
    return 0.0 if np.ptp(a) == 0.0 or np.ptp(b) == 0.0 else spearman(a.tolist(), b.tolist())
