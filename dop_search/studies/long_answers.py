"""Long answers: the divergence by position in the answer, for found strategies, uniform reduction and single cuts.

A search sees short answers; a description needs the image at every token, also late, when the pruned model has fed on
states that lack visual keys. All strategies are scored twice on the full model's own long answers: by the KL of every
position when those answers are fed in, and by generation, where an answer goes its own way from the first other token
on. What the full model itself makes of these questions (negative log-likelihood and top-1 accuracy of the annotated
answer by position) is in the summary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dop_search.app.results import ResultFile, Row
from dop_search.app.workbench import Workbench
from dop_search.data.samples import alike_batches
from dop_search.data.validation import Split
from dop_search.divergence import DivergenceEngine, Teacher
from dop_search.divergence.teacher import generate_ids
from dop_search.evaluation import correct_answers
from dop_search.pruning import pruned
from dop_search.search import rerank_all
from dop_search.strategy import Strategy
from dop_search.strategy.cost import Budget
from dop_search.studies.transfer import uniform
from dop_search.utils.errors import ConfigError, DataError
from dop_search.utils.statistics import bootstrap_ci95

FOUND, FOUND_LONG, UNIFORM = "found", "found_long", "uniform"
CUTS = ("kv", "q", "mlp")


def long_answers(
    bench: Workbench,
    results: ResultFile,
    long_data: Mapping[str, Any] | None = None,
    min_answer_tokens: int = 12,
    bin_tokens: int = 4,
    num_candidates: int = 16,
    cut_ratios: Mapping[str, float] | None = None,
) -> None:
    """Search on short and on long answers, and measure both on long ones; see the module.

    Args:
        bench: the model and its samples.
        results: where the rows go.
        long_data: keys of the data's configuration that make the answers long.
        min_answer_tokens: shorter answers of the full model are left out.
        bin_tokens: answer positions per bin.
        num_candidates: how many are re-ranked by exact KL in each search.
        cut_ratios: exit depth as a ratio for a module cut alone (``q``, ``kv``, ``mlp``), all tokens kept.
    """
    changes = dict(long_data or {})
    cuts = dict(cut_ratios or {})
    if min_answer_tokens < 3 or bin_tokens < 1:
        raise ConfigError(
            "`min_answer_tokens >= 3` and `bin_tokens >= 1` must hold in study.options, but got "
            f"(min_answer_tokens={min_answer_tokens}, bin_tokens={bin_tokens})"
        )
    if any(module not in CUTS or not 0.0 <= ratio <= 1.0 for module, ratio in cuts.items()):
        raise ConfigError(f"study.options.cut_ratios takes {', '.join(CUTS)} with ratios in [0, 1], but got {cuts}")
    engines: list[tuple[DivergenceEngine, list[int]]] = []

    def positions(strategy: Strategy) -> list[np.ndarray]:
        if not engines:
            teacher = bench.teacher("heldout", **changes)
            engine = DivergenceEngine(bench.loaded.adapter, teacher, memory=bench.config.memory, keep_states=False)
            engines.append((engine, long_enough(teacher, min_answer_tokens)))
        engine, chosen = engines[0]
        (values,) = engine.by_position([strategy])
        return [values[index] for index in chosen]

    def search(budget: float, **its: Any) -> Strategy:
        limit = Budget(flops_ratio=budget)
        usual = bench.profile().counts  # the budget is one of the configured data, whatever is searched on
        problem = replace(bench.profile(**its), counts=usual).problem(limit)
        with bench.watch(f"{limit.value:g}: ") as notify:
            return rerank_all(problem, limit, num_candidates, on_progress=notify)[0].strategy

    def row(strategy: str, budget: float) -> tuple[Row, np.ndarray]:
        if strategy in CUTS:
            depths: dict[str, Any] = dict.fromkeys(CUTS, bench.num_layers)
            depths[strategy] = round(cuts[strategy] * bench.num_layers)
            ranked = bench.profile().space.strategy_fields
            chosen = Strategy.depthwise(bench.num_layers, **depths, **ranked).canonical()
        elif strategy == UNIFORM:
            chosen = uniform(bench.profile().problem(Budget(flops_ratio=budget)), budget)
        else:
            chosen = search(budget, **(changes if strategy == FOUND_LONG else {}))
        values = positions(chosen)
        means = np.array([item.mean() for item in values])
        ratio = bench.profile().problem(Budget(flops_ratio=1.0)).cost_model.ratio(chosen)
        facts = {"strategy_text": chosen.describe(), "flops_ratio": ratio, "kl_heldout": float(means.mean())}
        its = {"kl_ci95": bootstrap_ci95(means), **by_position(values, bin_tokens)}
        return {**facts, **its, "generated": _generated(bench, chosen, changes, engines[0][1], bin_tokens)}, means

    keys = [{"strategy": name, "budget": budget} for budget in bench.budgets for name in (UNIFORM, FOUND, FOUND_LONG)]
    keys += [{"strategy": module, "budget": 1.0} for module in cuts]
    with bench.watch() as notify:
        results.measure(keys, row, notify, "divergence along long answers")
    results.sort(keys)
    summary = results.data["summary"]
    full = summary.get("full") or _full_model(bench, "heldout", changes, min_answer_tokens, bin_tokens)
    results.summarize({"full": full, "differences": _differences(results)})


def long_enough(teacher: Teacher, min_answer_tokens: int) -> list[int]:
    """Indices of the samples that the full model answers at such length.

    Raises:
        DataError: if there is none.
    """
    chosen = [i for i, sample in enumerate(teacher.samples) if len(sample.answer_ids) >= min_answer_tokens]
    if not chosen:
        longest = max(len(sample.answer_ids) for sample in teacher.samples)
        raise DataError(
            f"no answer of the full model has {min_answer_tokens} tokens, the longest has {longest}: lower "
            "study.options.min_answer_tokens, or raise max_new_tokens or change the families in study.options.long_data"
        )
    return chosen


def by_position(values: Sequence[np.ndarray], bin_tokens: int) -> dict[str, Any]:
    """How values per sample and answer position run along the answer.

    Returns:
        ``position``: first position of each bin; ``mean``, ``median``, ``ci95``: over the samples that reach it, of
        each sample's mean in the bin; ``num_samples``: how many these are (bins with fewer than a quarter of all are
        left out); ``late_minus_early_ci95``: paired 95 % interval of the mean of the last third of each answer
        minus that of its first third.
    """
    found: dict[str, list[Any]] = {"position": [], "mean": [], "median": [], "ci95": [], "num_samples": []}
    for start in range(0, max(map(len, values)), bin_tokens):
        its = np.array([item[start : start + bin_tokens].mean() for item in values if len(item) > start])
        if len(its) * 4 < len(values):
            break
        found["position"].append(start)
        found["mean"].append(float(its.mean()))
        found["median"].append(float(np.median(its)))
        found["ci95"].append(bootstrap_ci95(its))
        found["num_samples"].append(len(its))
    thirds = np.array([[part.mean() for part in np.array_split(item, 3)] for item in values])
    return {
        **found,
        "early_middle_late": thirds.mean(axis=0),
        "late_minus_early_ci95": bootstrap_ci95(thirds[:, 2] - thirds[:, 0]),
    }


def _full_model(
    bench: Workbench, split: Split, changes: Mapping[str, Any], min_answer_tokens: int, bin_tokens: int
) -> dict[str, Any]:
    """Negative log-likelihood (nats) and top-1 accuracy of the annotated answer, teacher-forced, by position."""
    its = bench.teacher(split, **{**changes, "answers": "ground_truth"})
    chosen = [its.samples[index] for index in long_enough(its, min_answer_tokens)]
    losses, right = [], []
    for sample in chosen:
        log_probs = sample.log_probs.cpu().numpy()
        ids = np.array(sample.answer_ids)
        losses.append(-log_probs[np.arange(len(ids)), ids].astype(np.float64))
        right.append((log_probs.argmax(axis=1) == ids).astype(np.float64))
    return {
        "num_answers": len(chosen),
        "longest": max(len(item) for item in losses),
        "whole_answers_right": float(np.mean([item.all() for item in right])),
        "nll": by_position(losses, bin_tokens),
        "accuracy": by_position(right, bin_tokens),
    }


def _generated(
    bench: Workbench, strategy: Strategy, changes: Mapping[str, Any], chosen: Sequence[int], bin_tokens: int
) -> dict[str, Any]:
    """Greedy answers under the strategy: how long they stay the full model's, and how many are right.

    Returns:
        ``position``, ``same_so_far``: share of the answers without another token up to the bin's first position;
        ``same``: share that never has one; ``right``, ``right_full``: shares of annotated answers given.
    """
    samples = [bench.data("heldout", **changes).samples[index] for index in chosen]
    answers = [bench.teacher("heldout", **changes).samples[index].answer_ids for index in chosen]
    limit = bench.data_config(changes).max_new_tokens
    given: dict[int, list[int]] = {}
    with pruned(bench.loaded.model, strategy), bench.watch() as notify:
        for batch in alike_batches(samples, bench.config.batch_size):
            ids = generate_ids(bench.loaded, [samples[index] for index in batch], limit)
            given.update(zip(batch, ids, strict=True))
            notify(len(given), len(samples), "long answers")
    decode = bench.loaded.processor.batch_decode
    texts = decode([given[index] for index in range(len(samples))], skip_special_tokens=True)
    full = decode(answers, skip_special_tokens=True)
    same = [first_other_token(given[index], answer) for index, answer in enumerate(answers)]
    position = list(range(0, max(map(len, answers)), bin_tokens))
    return {
        "position": position,
        "same_so_far": [float(np.mean([where > start for where in same])) for start in position],
        "same": float(np.mean(np.isinf(same))),
        "right": float(correct_answers([text.strip() for text in texts], samples).mean()),
        "right_full": float(correct_answers([text.strip() for text in full], samples).mean()),
    }


def first_other_token(given: Sequence[int], answer: Sequence[int]) -> float:
    """Position of the first token that differs from the answer's, or that is missing; infinite if there is none."""
    for position, token in enumerate(answer):
        if position >= len(given) or given[position] != token:
            return position
    return float("inf")


def _differences(results: ResultFile) -> dict[str, Any]:
    """Paired 95 % intervals of the held-out KL between strategies, per budget that strategies were searched for."""
    found = {}
    for budget in (budget for budget in results.budgets if results.find({"strategy": FOUND, "budget": budget})):
        samples = {
            name: results.per_sample({"strategy": name, "budget": budget}) for name in (UNIFORM, FOUND, FOUND_LONG)
        }
        found[f"{budget:g}"] = {
            f"{ours} - {theirs}": bootstrap_ci95(samples[ours] - samples[theirs])  # type: ignore[operator]
            for ours, theirs in ((FOUND, UNIFORM), (FOUND_LONG, UNIFORM), (FOUND_LONG, FOUND))
            if samples[ours] is not None and samples[theirs] is not None
        }
    return found
