"""Which measure of a strategy on the search samples predicts its held-out KL and its accuracy.

Measured on the same strategies, ranked by each objective, and compared with what they do on new samples: by Spearman's
rank correlation, and by the strategy that each objective would choose within a budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from pydantic import NonNegativeInt, PositiveInt, PrivateAttr, model_validator
from rich.table import Table
from scipy import stats
from torch import Tensor

from dop_search.app.report.style import FAINT, LOOKS, plain_decades, styled
from dop_search.app.results import ResultFile, Row
from dop_search.app.study import Measured, Result, Study
from dop_search.app.workbench import Workbench
from dop_search.data.validation import Split
from dop_search.divergence import DivergenceEngine, kl_divergence
from dop_search.evaluation.accuracy import correct_answers
from dop_search.search import Problem
from dop_search.search.candidates import best_candidates
from dop_search.search.solution import uniform_assignment
from dop_search.strategy import Strategy
from dop_search.strategy.cost import Budget

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


class Objective(Study):
    """Measure strategies of every budget by every objective; one row per strategy.

    An answer counts as right if the full model's is and the strategy's is the same: teacher-forced on the full model's
    answer, every top token is. What the full model gets wrong counts as wrong.
    """

    question = "Which measure of a strategy on the search samples predicts its held-out KL and its accuracy?"
    rows = "strategies by every objective"
    reads = ("search", "heldout", "test")
    judges = "test"
    group = ("budget",)

    num_good: PositiveInt = 10
    """Of the surrogate's best candidates, per budget; where there are fewer, random ones take their place."""
    num_random: NonNegativeInt = 10
    """Strategies of random depths with as many visual tokens as fit, per budget."""

    _known: dict[float, tuple[list[Strategy], np.ndarray]] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _enough_to_correlate(self) -> Objective:
        if self.num_good + self.num_random < 3:
            raise ValueError(
                "three strategies per budget are needed for a rank correlation, "
                f"but got (num_good={self.num_good}, num_random={self.num_random})"
            )
        return self

    @property
    def _names(self) -> list[str]:
        return [*(f"good {i}" for i in range(self.num_good)), *(f"random {i}" for i in range(self.num_random))]

    def keys(self, bench: Workbench) -> list[dict[str, Any]]:
        """See base class."""
        return [{"budget": budget, "candidate": name} for budget in bench.budgets for name in self._names]

    def row(self, bench: Workbench, budget: float, candidate: str) -> Measured:
        """See base class."""
        if budget not in self._known:
            self._known[budget] = self._measured(bench, budget)
        strategies, samples = self._known[budget]
        index = self._names.index(candidate)
        search, heldout, wrong = _unpack(bench, samples[[index]])
        scores = {name: float(value[0]) for name, value in score(search, _families(bench)).items()}
        found: Row = {"strategy": strategies[index].describe(), "objective": scores}
        return {**found, "kl_heldout": float(heldout.mean()), "accuracy": float(1.0 - wrong.mean())}, samples[index]

    def _measured(self, bench: Workbench, budget: float) -> tuple[list[Strategy], np.ndarray]:
        """The strategies of a budget, and what each does on all samples ``[strategies, values]``."""
        limit = Budget(flops_ratio=budget)
        problem = bench.profile().problem(limit)
        good = [problem.space.strategy(c.assignment) for c in best_candidates(problem, limit, self.num_good)]
        rng = np.random.default_rng([bench.config.seed, round(budget * 1e6)])
        chosen = good + _random_strategies(problem, limit, len(self._names) - len(good), rng)
        search, heldout, test = (_parts(bench, chosen, split) for split in ("search", "heldout", "test"))
        columns = [search.reshape(len(chosen), -1), heldout[:, :, PARTS.index("kl")], test[:, :, PARTS.index("wrong")]]
        return chosen, np.concatenate(columns, axis=1)

    def summarize(self, bench: Workbench, results: ResultFile) -> dict[str, Any]:
        """See base class."""
        found = [(key["budget"], results.per_sample(key)) for key in self.keys(bench)]
        known = [(budget, samples) for budget, samples in found if samples is not None]
        if not known:
            return {}
        budgets, values = np.array([budget for budget, _ in known]), np.stack([samples for _, samples in known])
        return summarize(budgets, *_unpack(bench, values), _families(bench))

    @staticmethod
    def figures(result: Result) -> dict[str, Figure]:
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
            left.set_title("What predicts new samples")
            for index, budget in enumerate(summary[names[0]]["chosen"]):
                look = LOOKS[2 + index % 4]
                values = [summary[name]["chosen"][budget]["kl_heldout"] for name in names]
                right.plot(
                    values,
                    range(len(names)),
                    color=look.color,
                    marker=look.marker,
                    linestyle="",
                    label=f"budget {budget}",
                )
            right.axhline(names.index("kl"), color=FAINT, linewidth=0.5)
            right.set_xscale("log")
            plain_decades(right.xaxis)
            right.set_xlabel("held-out KL of the strategy it would choose (nats)")
            right.set_title("What it chooses, by budget")
            left.legend(loc="upper left", bbox_to_anchor=(0.0, -0.14), ncols=2)
            right.legend(loc="upper left", bbox_to_anchor=(0.0, -0.14), ncols=4)
        return {"objective": figure}

    @staticmethod
    def table(result: Result) -> Table:
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


def _random_strategies(problem: Problem, limit: Budget, count: int, rng: np.random.Generator) -> list[Strategy]:
    found: dict[str, Strategy] = {}
    depths = [parameter for parameter in problem.space.parameters if parameter.role != "tokens"]
    for _ in range(1000 * max(count, 1)):
        if len(found) == count:
            break
        filled = uniform_assignment(problem, limit, {item.name: int(rng.choice(item.levels)) for item in depths})
        if filled is not None:
            strategy = problem.space.strategy(filled)
            found[strategy.key()] = strategy
    return list(found.values())


def _parts(bench: Workbench, strategies: Sequence[Strategy], split: Split) -> np.ndarray:
    """``[strategies, samples, len(PARTS)]``."""
    teacher, data = bench.teacher(split), bench.config.data
    engine = DivergenceEngine(
        bench.loaded.adapter, teacher, averaging=data.averaging, memory=bench.config.memory, divergence=distances
    )
    with bench.watch() as notify:
        what = f"{len(strategies)} strategies ({split})"
        values = engine.evaluate(strategies, on_progress=partial(notify, what=what))
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
    """What each objective predicts.

    Args:
        budgets: of each strategy ``[strategies]``.
        search: ``[strategies, search samples, len(PARTS)]``.
        heldout: KL ``[strategies, held-out samples]``.
        wrong: answers ``[strategies, test samples]``.
        families: of the search samples.

    Returns:
        Per objective: Spearman's correlation with held-out KL and with the share of wrong answers, mean over the
        budgets (``…_kl``, ``…_accuracy``) and over all strategies (``overall_…``); intervals when search, held-out and
        test samples are resampled (:func:`_interval`), also of the difference to the objective ``kl``; and ``chosen``,
        per budget what the objective's best strategy does on new samples.
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
                "ci95": _interval(float(values[name][index]), resampled[:, index]),
                "minus_kl_ci95": _interval(float(values[name][index] - values["kl"][index]), against[:, index]),
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


def _interval(estimate: float, draws: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of ``draws`` and its reflection in the estimate, together.

    Resampling adds noise, which lowers rank correlations: drawn from the committed rows, the draws alone cover 72 to
    91 %, their reflection 71 to 85 %, both together 86 to 97 %.
    """
    low, high = np.percentile(draws, (2.5, 97.5))
    return max(-1.0, min(low, 2 * estimate - high)), min(1.0, max(high, 2 * estimate - low))


def _correlations(
    budgets: np.ndarray, scores: Mapping[str, np.ndarray], kl: np.ndarray, wrong: np.ndarray
) -> dict[str, np.ndarray]:
    """Per objective Spearman with KL and with wrong answers: mean over the budgets, then over all strategies.

    0 where one side is constant, as an objective that distinguishes nothing predicts nothing.
    """
    table = np.stack([*scores.values(), kl, wrong])
    groups = [*(budgets == budget for budget in np.unique(budgets)), np.full(len(budgets), True)]
    with np.errstate(invalid="ignore", divide="ignore"):
        found = [np.corrcoef(stats.rankdata(table[:, group], axis=1))[:, -2:] for group in groups]
    *within, overall = np.nan_to_num(found)
    return dict(zip(scores, np.hstack([np.mean(within, axis=0), overall]), strict=False))


# -- figures ---------------------------------------------------------------------------------------


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
