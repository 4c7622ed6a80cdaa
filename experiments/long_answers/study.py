"""Long answers: the divergence by position in the answer, for found strategies, uniform reduction and single cuts.

A search sees short answers; a description needs the image at every token, also late, when the pruned model has fed on
states that lack visual keys. All strategies are scored twice on the full model's own long answers: by the KL of every
position when those answers are fed in, and by generation, where an answer goes its own way from the first other token
on. What the full model itself makes of these questions (negative log-likelihood and top-1 accuracy of the annotated
answer by position) is in the summary.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, get_args

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import Field, PositiveInt, PrivateAttr

from dop_search.app.report.style import FOUND as FOUND_COLOR
from dop_search.app.report.style import INK, LOOKS, SMALLEST_KL, Look, styled
from dop_search.app.report.style import UNIFORM as UNIFORM_COLOR
from dop_search.app.results import ResultFile
from dop_search.app.study import Measured, Result, Study
from dop_search.app.workbench import Workbench
from dop_search.data.samples import alike_batches
from dop_search.data.validation import Split
from dop_search.divergence import DivergenceEngine, Teacher
from dop_search.divergence.teacher import generate_ids
from dop_search.evaluation.accuracy import correct_answers
from dop_search.pruning import pruned
from dop_search.search import rerank_all, uniform_strategy
from dop_search.strategy import Strategy
from dop_search.strategy.cost import Budget
from dop_search.utils.errors import DataError
from dop_search.utils.intervals import mean_ci95

FOUND, FOUND_LONG, UNIFORM = "found", "found_long", "uniform"
Cut = Literal["kv", "q", "mlp"]
CUTS: tuple[str, ...] = get_args(Cut)


class LongAnswers(Study):
    """Search on short and on long answers, and measure both on long ones; see the module."""

    question = "Does the divergence grow along a long answer, and does a search on short answers do for long ones?"
    rows = "divergence along long answers"
    judges = "heldout"

    long_data: dict[str, Any] = Field(default_factory=dict)
    """Keys of the data's configuration that make the answers long."""
    min_answer_tokens: Annotated[int, Field(ge=3)] = 12
    """Shorter answers of the full model are left out."""
    bin_tokens: PositiveInt = 4
    """Answer positions per bin."""
    num_candidates: PositiveInt = 16
    """How many are re-ranked by exact KL in each search."""
    cut_ratios: dict[Cut, Annotated[float, Field(ge=0.0, le=1.0)]] = Field(default_factory=dict)
    """Exit depth as a ratio for a module cut alone (``q``, ``kv``, ``mlp``), all tokens kept."""

    _engines: list[tuple[DivergenceEngine, list[int]]] = PrivateAttr(default_factory=list)

    def keys(self, bench: Workbench) -> list[dict[str, Any]]:
        """See base class."""
        searched = itertools.product(bench.budgets, (UNIFORM, FOUND, FOUND_LONG))
        return [
            *({"strategy": name, "budget": budget} for budget, name in searched),
            *({"strategy": module, "budget": 1.0} for module in self.cut_ratios),
        ]

    def row(self, bench: Workbench, strategy: str, budget: float) -> Measured:
        """See base class."""
        chosen = self._strategy(bench, strategy, budget)
        engine, indices = self._engine(bench)
        (values,) = engine.by_position([chosen])
        values = [values[index] for index in indices]
        means = np.array([item.mean() for item in values])
        ratio = bench.profile().problem(Budget(flops_ratio=1.0)).cost_model.ratio(chosen)
        facts = {"strategy_text": chosen.describe(), "flops_ratio": ratio, "kl_heldout": float(means.mean())}
        its = {"kl_ci95": mean_ci95(means), **by_position(values, self.bin_tokens)}
        generated = _generated(bench, chosen, self.long_data, indices, self.bin_tokens)
        return {**facts, **its, "generated": generated}, means

    def _strategy(self, bench: Workbench, name: str, budget: float) -> Strategy:
        limit = Budget(flops_ratio=budget)
        if name in CUTS:
            depths: dict[str, Any] = dict.fromkeys(CUTS, bench.num_layers)
            depths |= {cut: round(ratio * bench.num_layers) for cut, ratio in self.cut_ratios.items() if cut == name}
            ranked = bench.profile().space.strategy_fields
            return Strategy.depthwise(bench.num_layers, **depths, **ranked).canonical()
        if name == UNIFORM:
            return uniform_strategy(bench.profile().problem(limit), limit)
        usual = bench.profile().counts  # the budget is one of the configured data, whatever is searched on
        profile = bench.profile(**(self.long_data if name == FOUND_LONG else {}))
        with bench.watch(f"{limit.value:g}: ") as notify:
            problem = replace(profile, counts=usual).problem(limit)
            return rerank_all(problem, limit, self.num_candidates, on_progress=notify)[0].strategy

    def _engine(self, bench: Workbench) -> tuple[DivergenceEngine, list[int]]:
        """The engine on the held-out samples, and which of them have long answers."""
        if not self._engines:
            teacher = bench.teacher("heldout", **self.long_data)
            engine = DivergenceEngine(bench.loaded.adapter, teacher, memory=bench.config.memory, keep_states=False)
            self._engines.append((engine, long_enough(teacher, self.min_answer_tokens)))
        return self._engines[0]

    def summarize(self, bench: Workbench, results: ResultFile) -> dict[str, Any]:
        """See base class."""
        known = results.data["summary"].get("full")
        full = known or _full_model(bench, "heldout", self.long_data, self.min_answer_tokens, self.bin_tokens)
        return {"full": full, "differences": _differences(results)}

    @staticmethod
    def figures(result: Result) -> dict[str, Figure]:
        """``long_answers``: a column per budget, one of the single cuts, one of the full model.

        Above KL by position in the full model's answers, below how many generated answers are the full model's so far.
        """
        rows = [row for row in result["rows"] if "position" in row]
        if not rows:
            return {}
        budgets = list(dict.fromkeys(row["budget"] for row in rows))
        full = result["summary"].get("full")
        with styled():
            figure = Figure(figsize=(2.0 * (len(budgets) + 1), 5.4), layout="constrained")
            axes = figure.subplots(2, len(budgets) + 1, sharex=True)
            for column, budget in enumerate(budgets):
                its = [row for row in rows if row["budget"] == budget]
                _draw_divergence(axes[0, column], its)
                _draw_generated(axes[1, column], its)
                axes[0, column].set_title("one module cut" if budget == 1.0 else f"{budget:g} of the FLOPs")
            ends = [axis.get_ylim() for axis in axes[0, : len(budgets)]]
            for axis in axes[0, : len(budgets)]:
                axis.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))
            for axis in axes[:, 1 : len(budgets)].flat:
                axis.tick_params(labelleft=False)
            for axis in axes[1]:
                axis.set_xlabel("answer position (tokens)")
            axes[0, 0].set_ylabel("KL to the full model (nats)")
            axes[1, 0].set_ylabel("generated answers still the same")
            if full is not None:
                _draw_full_model(axes[0, -1], full)
            axes[1, -1].set_axis_off()
            axes[0, -1].tick_params(labelbottom=True)
            seen: dict[str, Artist] = {}
            for axis in axes[0]:
                handles, labels = axis.get_legend_handles_labels()
                seen |= dict(zip(labels, handles, strict=True))
            figure.legend(list(seen.values()), list(seen), loc="outside lower center", ncols=3)
        return {"long_answers": figure}


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
        found["ci95"].append(mean_ci95(its))
        found["num_samples"].append(len(its))
    thirds = np.array([[part.mean() for part in np.array_split(item, 3)] for item in values])
    return {
        **found,
        "early_middle_late": thirds.mean(axis=0),
        "late_minus_early_ci95": mean_ci95(thirds[:, 2] - thirds[:, 0]),
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
            f"{ours} - {theirs}": mean_ci95(samples[ours] - samples[theirs])  # type: ignore[operator]
            for ours, theirs in ((FOUND, UNIFORM), (FOUND_LONG, UNIFORM), (FOUND_LONG, FOUND))
            if samples[ours] is not None and samples[theirs] is not None
        }
    return found


# -- figures ---------------------------------------------------------------------------------------


_LOOKS = {
    "uniform": Look(UNIFORM_COLOR, "s", "--"),
    "found": Look(FOUND_COLOR, "o", "-"),
    "found_long": LOOKS[2],
    "kv": LOOKS[3],
    "q": LOOKS[4],
    "mlp": LOOKS[5],
}
_NAMES = {"uniform": "uniform reduction", "found": "found on the search data", "found_long": "found on long answers"}


def _draw_divergence(axis: Axes, rows: list[Mapping[str, Any]]) -> None:
    for row in rows:
        look = _LOOKS[row["strategy"]]
        low, high = zip(
            *(ends or (mean, mean) for ends, mean in zip(row["ci95"], row["mean"], strict=True)), strict=True
        )
        floor = [max(value, SMALLEST_KL) for value in row["mean"]]
        label = _NAMES.get(row["strategy"], f"{row['strategy']} cut alone: {row['strategy_text'].rsplit(' n_v', 1)[0]}")
        axis.plot(row["position"], floor, color=look.color, marker=look.marker, linestyle=look.line, label=label)
        axis.fill_between(
            row["position"],
            [max(value, SMALLEST_KL) for value in low],
            [max(value, SMALLEST_KL) for value in high],
            color=look.color,
            alpha=0.12,
            linewidth=0.0,
        )
    axis.set_yscale("log")


def _draw_generated(axis: Axes, rows: list[Mapping[str, Any]]) -> None:
    for row in (row for row in rows if "generated" in row):
        look, its = _LOOKS[row["strategy"]], row["generated"]
        axis.plot(its["position"], its["same_so_far"], color=look.color, marker=look.marker, linestyle=look.line)
    axis.set_ylim(0.0, 1.05)


def _draw_full_model(axis: Axes, full: Mapping[str, Any]) -> None:
    accuracy = full["accuracy"]
    axis.plot(accuracy["position"], accuracy["mean"], color=INK, marker="x", label="full model: annotated tokens right")
    axis.set_ylim(0.0, 1.05)
    axis.set_title("full model")
