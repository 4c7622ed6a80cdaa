"""The straight line: configuration → model and data → curves → strategies → confirmation → record."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dop_search.app.begin import begin
from dop_search.app.config import SearchConfig
from dop_search.app.config.solvers import SearchPlace
from dop_search.app.data_checks import check_data
from dop_search.app.provenance import model_info, provenance
from dop_search.app.record import (
    CURVES_FILE,
    RECORD_FILE,
    SAMPLES_FILE,
    Candidate,
    DataInfo,
    Named,
    Provenance,
    Record,
    Result,
    UniformResult,
    save_sample_ids,
)
from dop_search.app.report import write_report
from dop_search.app.report.study import STUDIES_FILE
from dop_search.app.scoring import EVALUATION_FOLDER, SuiteJudge
from dop_search.app.tracking.store import log_search
from dop_search.app.workbench import Workbench
from dop_search.baselines.pricing import Pricing
from dop_search.baselines.space_search import search_options, without_selection
from dop_search.data.validation import Split, sources_of
from dop_search.divergence.profiling import MeasuredProfile, make_space
from dop_search.evaluation.timing.layer_times import SHARES, table_for
from dop_search.evaluation.timing.timing import Clock
from dop_search.models.fast_linear import fast_linear
from dop_search.search import MeasuredSolution, Option, Problem, pareto_front, uniform_assignment
from dop_search.selectors import make_selector
from dop_search.strategy import Strategy
from dop_search.strategy.cost import Budget, CostModel
from dop_search.utils.intervals import holm, mean_ci95, num_dominant, sign_flip_p
from dop_search.utils.progress import Notify, Progress
from dop_search.utils.registry import import_modules

MAX_FRONT_POINTS = 200
log = logging.getLogger(__name__)


def run(config: SearchConfig, run_dir: Path, progress: Progress) -> Record:
    """Search a strategy for every budget of ``config`` and confirm it on samples that the search never saw.

    Writes ``strategy-<budget>.json``, ``curves.parquet``, ``record.json`` and the report to ``run_dir``, and logs to
    MLflow. What is measured is kept in ``config.cache_dir`` by content, so that the same configuration continues where
    it stopped.
    """
    started, start = datetime.now(UTC), time.perf_counter()
    import_modules(config.imports)
    make_selector(config.selector.name, config.selector.options)  # a misspelt name is an error before loading
    for name in config.selector.also:
        make_selector(name)
    check_data(config.data, config.eval, needed_splits(config))
    loaded = begin(config, run_dir, "hydra.run.dir", progress)
    bench = Workbench(config, loaded, progress)
    search_id = uuid.uuid4().hex[:12]  # ties strategies and tracked runs to this search
    with fast_linear(loaded.model):
        profile = _prepare(bench)
    if any(budget.kind == "latency" for budget in config.budget):
        profile = _with_latency(bench, profile)
    judge = None
    studies: list[tuple[str, str]] = []
    with fast_linear(loaded.model):
        results = [_solve_budget(bench, profile, budget, search_id, studies) for budget in config.budget]
        results = _adjusted(results)
        if config.eval.benchmarks:
            judge = SuiteJudge(loaded, config.eval, Path(config.cache_dir) / EVALUATION_FOLDER, progress)
            with bench.stage("benchmarks"):
                results = judge.judge(results, config.seed)
    record = _record(
        bench, profile, results, provenance("dop-search", started, config.model_dump(mode="json"), search_id)
    )
    record = record.model_copy(
        update={"seconds": time.perf_counter() - start, "scores": None if judge is None else judge.info()}
    )
    run_dir.mkdir(parents=True, exist_ok=True)
    profile.curves.save(run_dir / CURVES_FILE)
    ids = {str(split): bench.data(split).ids for split in needed_splits(config)}
    save_sample_ids(run_dir / SAMPLES_FILE, ids, record.data.fingerprints)
    for result in record.results:
        result.strategy.save(run_dir / f"strategy-{result.budget.text.replace(' ', '-')}.json")
    record.save(run_dir / RECORD_FILE)
    if studies:
        from dop_search.search.optuna_study import copy_studies

        copy_studies(studies, run_dir / STUDIES_FILE)
    with progress.task("report"):
        write_report(record, profile.curves, run_dir)
    if config.tracking.backend != "none":
        with progress.task("log to MLflow"):
            log_search(config.tracking, record, run_dir)
    return record


def needed_splits(config: SearchConfig) -> tuple[Split, ...]:
    """The disjoint sets that a search needs; the test set only for ``eval=accuracy``."""
    judged: tuple[Split, ...] = ("test",) if config.eval.name == "accuracy" and config.data.num_test else ()
    decided: tuple[Split, ...] = ("decision",) if config.search.solver == "joint" and config.data.num_decision else ()
    return ("search", "heldout", *judged, *decided)


def _prepare(bench: Workbench) -> MeasuredProfile:
    with bench.stage("data"), bench.progress.task(f"data: {bench.config.data.name}"):
        for split in needed_splits(bench.config):
            bench.data(split)
    for split in ("search", "heldout"):
        with bench.stage(f"teacher_{split}"):
            bench.teacher(split)
    with bench.stage("curves"):
        return bench.profile()


def _with_latency(bench: Workbench, profile: MeasuredProfile) -> MeasuredProfile:
    """The profile with layer times of this device, as a pruned model will run: without the search's short cuts.

    One thread is timed by what it computes, so that other processes on the machine don't count.
    """
    clock: Clock = "cpu" if bench.loaded.adapter.device.type == "cpu" and torch.get_num_threads() == 1 else "wall"
    space = bench.config.space
    shares = SHARES if len(space.shares) > 1 or {*space.also} & {"dop_groups", "gsop"} else ()
    with bench.stage("latency"), bench.watch() as notify:
        table = table_for(
            bench.loaded.model, profile.counts, bench.cache, shares=shares, clock=clock, on_progress=notify
        )
    return replace(profile, latency=table)


def _solve_budget(
    bench: Workbench, profile: MeasuredProfile, budget: Budget, search_id: str, studies: list[tuple[str, str]]
) -> Result:
    start = time.perf_counter()
    config = bench.config
    with bench.stage("solve"), bench.watch(f"budget {budget.name}={budget.value:g}: ") as notify:
        place = _place(bench, profile, budget, notify)
        ranked = config.search.candidates(place)
        studies += place.studies
    best = ranked[0]
    if best.strategy.selector != config.selector.name:  # uniform reduction by the same selector
        profile = replace(bench.profile(selector=best.strategy.selector), latency=profile.latency)
    prices: Pricing | CostModel = profile.prices("flops")
    left = budget
    if config.search.solver == "joint":  # which pays for what the selector computes
        prices = bench.context().pricing
        left = without_selection(prices, profile, budget)
    assignment = uniform_assignment(profile.problem(left), left)
    uniform = None if assignment is None else profile.space.strategy(assignment)
    strategies = [best.strategy] if uniform is None else [best.strategy, uniform]
    with bench.stage("confirm"), bench.watch(f"budget {budget.name}={budget.value:g}: ") as notify:
        heldout = bench.store("heldout", best.strategy.selector).evaluate(
            strategies, on_progress=notify, what="held-out set"
        )
        accuracies: list[float | None] = [None] * (1 + len(strategies))
        if "test" in needed_splits(config):
            accuracies = [float(bench.correct(item, "test", notify).mean()) for item in (None, *strategies)]
    search = profile.store.evaluate(strategies)
    between = heldout[0] - heldout[-1]
    tested = uniform is not None and len(between) > 1
    cache = profile.prices("kv_cache")
    times = None if profile.latency is None else profile.prices("latency")

    def measured(place: int) -> dict[str, Any]:
        its = strategies[place]
        return {
            "flops_ratio": prices.ratio(its),
            "kv_ratio": cache.ratio(its),
            "latency_ratio": None if times is None else times.ratio(its),
            "kl_search": float(search[place].mean()),
            "kl_heldout": float(heldout[place].mean()),
            "kl_heldout_ci95": mean_ci95(heldout[place], config.seed),
        }

    found = measured(0)
    strategy = replace(
        best.strategy,
        provenance={
            **profile.facts,
            "budget": {budget.name: budget.value},
            "space": "|".join([config.space.name, *(config.space.also if config.search.solver == "joint" else ())]),
            "solver": config.search.solver,
            "search_id": search_id,
            "flops_ratio": found["flops_ratio"],
            "kl_search_nats": found["kl_search"],
            "kl_heldout_nats": found["kl_heldout"],
        },
    )
    return Result(
        budget=budget,
        strategy=strategy,
        **found,
        kl_additive=best.kl_additive,
        kl_search_ci95=mean_ci95(search[0], config.seed),
        num_dominant=num_dominant(heldout[0]),
        accuracy_full=accuracies[0],
        accuracy_pruned=accuracies[1],
        uniform=None
        if uniform is None
        else UniformResult(
            num_visual_tokens=uniform.num_kept(profile.space.tokens.full),
            **measured(1),
            accuracy=accuracies[2],
        ),
        latency_ms=None if times is None else times.absolute(strategy) / 1e6,
        kl_heldout_difference_ci95=mean_ci95(between, config.seed) if tested else None,
        kl_heldout_difference_p=sign_flip_p(between, config.seed) if tested else None,
        num_validation_runs=bench.num_curve_runs + best.num_validation_runs,
        seconds=time.perf_counter() - start,
        candidates=[_candidate(item, prices, uniform) for item in ranked],
        study=place.studies[-1][1] if place.studies else None,
    )


def _adjusted(results: Sequence[Result]) -> list[Result]:
    """The results with the p-values of all budgets adjusted together."""
    tested = [result for result in results if result.kl_heldout_difference_p is not None]
    p_values = holm([result.kl_heldout_difference_p or 0.0 for result in tested])
    known = {id(result): p for result, p in zip(tested, p_values, strict=True)}
    return [result.model_copy(update={"kl_heldout_difference_p": known.get(id(result))}) for result in results]


def _candidate(solution: MeasuredSolution, prices: Pricing | CostModel, uniform: Strategy | None) -> Candidate:
    return Candidate(
        describe=solution.strategy.describe(),
        flops_ratio=prices.ratio(solution.strategy),
        kl_search=solution.kl_search,
        kl_additive=solution.kl_additive,
        kl_decision=solution.kl_decision,
        selector=solution.strategy.selector,
        is_uniform=uniform is not None and solution.strategy.key() == uniform.key(),
    )


def _place(bench: Workbench, profile: MeasuredProfile, budget: Budget, notify: Notify) -> SearchPlace:
    return SearchPlace(
        problem=profile.problem(budget),
        budget=budget,
        on_progress=notify,
        model=bench.loaded.name,
        teacher=str(profile.facts["teacher"]),
        averaging=bench.config.data.averaging,
        storage=bench.config.storage,
        cache_dir=bench.cache,
        options=partial(_options, bench, profile, budget, notify),
        decide=bench.decide,
        also=(bench.config.selector.also, bench.config.space.also),
    )


def _options(bench: Workbench, profile: MeasuredProfile, budget: Budget, notify: Notify) -> list[Option]:
    """What ``search=joint`` chooses among; pairs of a space and a selector that the model cannot have are left out."""
    selector, space = bench.config.selector, bench.config.space
    options, left_out = search_options(
        replace(bench.context(), on_progress=notify),
        [None, *(name for name in space.also if name != space.name)],
        [None, *(name for name in selector.also if name != selector.name)],
        budget,
        lambda its: replace(its, latency=profile.latency),
    )
    for note in left_out:
        log.warning(note)
    return options


def _record(bench: Workbench, profile: MeasuredProfile, results: list[Result], provenance: Provenance) -> Record:
    config, problem, counts = bench.config, profile.problem(), profile.counts
    uniform = make_space("uniform", profile.dims.num_layers, profile.space.tokens.full)
    data = {split: bench.data(split) for split in needed_splits(config)}
    return Record(
        model=model_info(
            bench.loaded,
            num_visual_tokens=float(np.mean([item.visual for item in counts])),
            num_text_tokens=float(np.mean([item.text for item in counts])),
        ),
        data=DataInfo(
            name=config.data.name,
            num_samples=len(data["search"]),
            num_heldout=len(data["heldout"]),
            num_test=len(data["test"]) if "test" in data else 0,
            num_decision=len(data["decision"]) if "decision" in data else 0,
            seed=config.data.seed,
            answers=config.data.answers,
            averaging=config.data.averaging,
            fingerprints={split: its.fingerprint for split, its in data.items()},
            sources=[asdict(source) for source in sources_of(config.data.name, config.data.sources)],
            samples_file=SAMPLES_FILE,
        ),
        selector=Named(
            name=config.selector.name,
            options=config.selector.options | ({"also": [*config.selector.also]} if config.selector.also else {}),
        ),
        space=Named(name=config.space.name, options=config.space.model_dump(mode="json", exclude={"name"})),
        solver=Named(name=config.search.solver, options=config.search.model_dump(mode="json", exclude={"solver"})),
        results=results,
        floor_ratio=problem.cost_model.floor_ratio,
        front=_front_points(problem),
        uniform_front=_front_points(Problem(uniform, problem.cost_model, profile.curves.surrogate(uniform))),
        num_validation_runs=bench.num_search_runs,
        timings=bench.timings,
        provenance=provenance,
    )


def _front_points(problem: Problem) -> list[tuple[float, float]]:
    """At most ``MAX_FRONT_POINTS`` points of the surrogate's Pareto front, spread over it."""
    front = pareto_front(problem)
    rows = np.unique(np.linspace(0, len(front) - 1, min(len(front), MAX_FRONT_POINTS)).round().astype(int))
    return [(float(front.cost_ratio[row]), float(front.divergence_nats[row])) for row in rows]
