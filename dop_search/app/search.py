"""The straight line: configuration → model and data → curves → strategies → confirmation → record."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from dop_search.app.config import SearchConfig
from dop_search.app.config.schema import BudgetConfig
from dop_search.app.config.solvers import AdditiveExactConfig, AdditiveOptunaConfig, ExactOptunaConfig
from dop_search.app.provenance import model_info, provenance
from dop_search.app.record import (
    CURVES_FILE,
    RECORD_FILE,
    SAMPLES_FILE,
    Candidate,
    DataInfo,
    Named,
    Record,
    Result,
    UniformResult,
    save_sample_ids,
)
from dop_search.app.report import write_report
from dop_search.app.scoring import (
    EVALUATION_FOLDER,
    AccuracyJudge,
    SuiteJudge,
    open_suite,
)
from dop_search.app.search_data import check_data, data_sources, load_data, needed_splits
from dop_search.app.tracking.store import log_search
from dop_search.data.samples import ValidationSet
from dop_search.data.validation import Split
from dop_search.divergence import Teacher, make_teacher
from dop_search.divergence.profiling import Profile, evaluation_store, make_space, profile
from dop_search.evaluation.timing.layer_times import SHARES, table_for
from dop_search.evaluation.timing.timing import Clock
from dop_search.models.fast_linear import fast_linear
from dop_search.models.loading import LoadedModel, load
from dop_search.search import (
    Criterion,
    CurveGrid,
    EvaluationStore,
    Problem,
    Solution,
    best_first,
    pareto_front,
    rerank_all,
    solve,
    uniform_assignment,
)
from dop_search.selectors import Selector, make_selector
from dop_search.strategy import Strategy
from dop_search.strategy.cost import Budget, CostModel
from dop_search.utils.extensions import import_modules
from dop_search.utils.files import check_writable
from dop_search.utils.progress import Notify, Progress, watch
from dop_search.utils.statistics import bootstrap_ci95

MAX_FRONT_POINTS = 200


@dataclass
class SearchRun:
    """What the stages of one search share."""

    config: SearchConfig
    progress: Progress
    loaded: LoadedModel
    data: dict[Split, ValidationSet]
    selector: Selector
    profile: Profile
    heldout: EvaluationStore
    timings: dict[str, float]
    accuracy: AccuracyJudge
    search_id: str
    """Ties strategies and tracked runs to this search."""


def run(config: SearchConfig, run_dir: Path, progress: Progress) -> Record:
    """Search a strategy for every budget of ``config`` and confirm it on samples that the search never saw.

    Writes ``strategy-<budget>.json``, ``curves.parquet``, ``record.json`` and the report to ``run_dir``, and logs to
    MLflow. What is measured is kept in ``config.cache_dir`` by content, so that the same configuration continues where
    it stopped.

    Raises:
        DopError: on anything a user can mend; the message says how.
    """
    started, start = datetime.now(UTC), time.perf_counter()
    import_modules(config.imports)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    check_writable(Path(config.cache_dir), "cache_dir")
    check_writable(run_dir, "hydra.run.dir")
    suite = open_suite(config.eval)
    make_selector(config.selector.name, config.selector.options)  # a misspelt name is an error before loading
    check_data(config.data, suite, needed_splits(config))
    with progress.task(f"load {config.model.name_or_path}"):
        transformers_logging.disable_progress_bar()
        loaded = load(**config.model.model_dump())
    with fast_linear(loaded.model):
        state = prepare(config, loaded, progress)
    if any(budget.is_latency for budget in config.budget):
        state.profile = _with_latency(state)
    with fast_linear(loaded.model):
        results = [_solve_budget(state, budget) for budget in config.budget]
        judge = None
        if suite is not None:
            judge = SuiteJudge(loaded, suite, Path(config.cache_dir) / EVALUATION_FOLDER, progress)
            with stage(state.timings, "benchmarks"):
                results = judge.judge(results, config.seed)
    record = _record(state, results, started, time.perf_counter() - start)
    if judge is not None:
        record = record.model_copy(update={"scores": judge.info()})
    run_dir.mkdir(parents=True, exist_ok=True)
    state.profile.curves.save(run_dir / CURVES_FILE)
    ids = {str(split): data.ids for split, data in state.data.items()}
    save_sample_ids(run_dir / SAMPLES_FILE, ids, record.data.fingerprints)
    for result in record.results:
        result.strategy.save(run_dir / f"strategy-{result.budget_text.replace(' ', '-')}.json")
    record.save(run_dir / RECORD_FILE)
    with progress.task("report"):
        write_report(record, state.profile.curves, run_dir)
    if config.tracking.backend != "none":
        with progress.task("log to MLflow"):
            log_search(config.tracking, record, run_dir)
    return record


# -- model, data, curves --------------------------------------------------------------------------


def prepare(config: SearchConfig, loaded: LoadedModel, progress: Progress) -> SearchRun:
    """Load the data, ask the full model, measure the curves."""
    timings: dict[str, float] = {}
    cache = Path(config.cache_dir)
    selector = make_selector(config.selector.name, config.selector.options)
    with stage(timings, "data"), progress.task(f"data: {config.data.name}"):
        data = load_data(config)
    teachers: dict[str, Teacher] = {}
    for split in ("search", "heldout"):
        with stage(timings, f"teacher_{split}"), watch(progress) as notify:
            teachers[split] = make_teacher(
                loaded,
                data[split],
                selector,
                max_new_tokens=config.data.max_new_tokens,
                answers=config.data.answers,
                batch_size=config.batch_size,
                cache_dir=cache,
                on_progress=partial(notify, what=f"full model on the {split} set"),
            )
    with stage(timings, "curves"), watch(progress) as notify:
        measured = profile(
            loaded,
            data["search"],
            selector,
            space=config.space.name,
            shares=config.space.shares,
            grid=CurveGrid.of(config.space.num_depth_levels, config.space.num_token_levels),
            teacher=teachers["search"],
            averaging=config.data.averaging,
            batch_size=config.batch_size,
            hidden_states=config.hidden_states,
            cache_dir=cache,
            storage=config.storage,
            on_progress=notify,
        )
    heldout = evaluation_store(
        loaded,
        teachers["heldout"],
        averaging=config.data.averaging,
        cache_dir=cache,
        storage=config.storage,
        hidden_states="recompute",
    )
    test = data["test"].samples if "test" in data else ()
    accuracy = AccuracyJudge(loaded, test, config.batch_size, config.data.max_new_tokens)
    return SearchRun(
        config, progress, loaded, data, selector, measured, heldout, timings, accuracy, search_id=uuid.uuid4().hex[:12]
    )


def _with_latency(state: SearchRun) -> Profile:
    """The profile with layer times of this device, as a pruned model will run: without the search's short cuts.

    One thread is timed by what it computes, so that other processes on the machine don't count.
    """
    clock: Clock = "cpu" if state.loaded.adapter.device.type == "cpu" and torch.get_num_threads() == 1 else "wall"
    shares = SHARES if len(state.config.space.shares) > 1 else ()
    cache = Path(state.config.cache_dir)
    with stage(state.timings, "latency"), watch(state.progress) as notify:
        table = table_for(
            state.loaded.model, state.profile.counts, cache, shares=shares, clock=clock, on_progress=notify
        )
    return replace(state.profile, latency=table)


# -- one budget -----------------------------------------------------------------------------------


def _solve_budget(state: SearchRun, limit: BudgetConfig) -> Result:
    start = time.perf_counter()
    budget = Budget(**limit.model_dump(exclude_none=True))
    problem = state.profile.problem(budget)
    with stage(state.timings, "solve"), watch(state.progress, f"budget {limit.name}={limit.value:g}: ") as notify:
        ranked = _candidates(state, problem, budget, limit, notify)
    best = ranked[0]
    uniform = _uniform_strategy(problem, budget)
    strategies = [best.strategy] if uniform is None else [best.strategy, uniform]
    with stage(state.timings, "confirm"), watch(state.progress, f"budget {limit.name}={limit.value:g}: ") as notify:
        heldout = state.heldout.evaluate(strategies, on_progress=notify, what="held-out set")
        correct = [state.accuracy.correct(strategy, notify) for strategy in (None, *strategies)]
    flops = CostModel(state.profile.dims, state.profile.counts, "flops")
    cache = CostModel(state.profile.dims, state.profile.counts, "kv_cache")
    latency = state.profile.latency
    times = None if latency is None else CostModel(state.profile.dims, state.profile.counts, "latency", latency=latency)
    store, seed = state.profile.store, state.config.seed
    assert store is not None
    search = store.evaluate(strategies)
    strategy = replace(
        best.strategy,
        provenance={
            **state.profile.facts,
            "budget": {limit.name: limit.value},
            "space": state.config.space.name,
            "solver": state.config.search.solver,
            "search_id": state.search_id,
            "flops_ratio": flops.ratio(best.strategy),
            "kl_search_nats": float(search[0].mean()),
            "kl_heldout_nats": float(heldout[0].mean()),
        },
    )
    return Result(
        budget=limit.plain,
        strategy=strategy,
        flops_ratio=flops.ratio(strategy),
        kv_ratio=cache.ratio(strategy),
        kl_additive=best.divergence_additive,
        kl_search=float(search[0].mean()),
        kl_search_ci95=bootstrap_ci95(search[0], seed),
        kl_heldout=float(heldout[0].mean()),
        kl_heldout_ci95=bootstrap_ci95(heldout[0], seed),
        accuracy_full=_mean(correct[0]),
        accuracy_pruned=_mean(correct[1]),
        uniform=None
        if uniform is None
        else UniformResult(
            num_visual_tokens=uniform.num_kept(state.profile.space.tokens.full),
            flops_ratio=flops.ratio(uniform),
            kv_ratio=cache.ratio(uniform),
            kl_heldout=float(heldout[1].mean()),
            kl_heldout_ci95=bootstrap_ci95(heldout[1], seed),
            kl_search=float(search[1].mean()),
            accuracy=_mean(correct[2]),
            latency_ratio=None if times is None else times.ratio(uniform),
        ),
        latency_ratio=None if times is None else times.ratio(strategy),
        latency_ms=None if times is None else times.absolute(strategy) / 1e6,
        kl_heldout_difference_ci95=None if uniform is None else bootstrap_ci95(heldout[0] - heldout[1], seed),
        num_validation_runs=state.profile.curves.num_validation_runs + best.num_validation_runs,
        seconds=time.perf_counter() - start,
        candidates=[
            Candidate(
                describe=item.strategy.describe(),
                flops_ratio=flops.ratio(item.strategy),
                kl_search=item.divergence_exact,
                kl_additive=item.divergence_additive,
                is_uniform=uniform is not None and item.strategy.key() == uniform.key(),
            )
            for item in ranked
            if item.divergence_exact is not None
        ],
    )


def _candidates(
    state: SearchRun, problem: Problem, budget: Budget, limit: BudgetConfig, notify: Notify
) -> list[Solution]:
    """The solver's solution and what it was compared with, the best first."""
    search = state.config.search
    options = search.model_dump(exclude={"solver", "num_rerank", "criterion", "storage", "study_name"})
    if isinstance(search, AdditiveExactConfig):
        return rerank_all(problem, budget, search.num_rerank, criterion=search.criterion, on_progress=notify)
    if isinstance(search, AdditiveOptunaConfig):
        found = solve("additive_optuna", problem, budget, on_progress=notify, **options)
        ranked = rerank_all(problem, budget, search.num_rerank, criterion=search.criterion, on_progress=notify)
        return _with_exact(problem, found, ranked, search.criterion)
    if isinstance(search, ExactOptunaConfig):
        name = search.study_name or _study_name(state, search)
        storage = search.storage or state.config.storage or str(Path(state.config.cache_dir) / f"study-{name}.journal")
        options |= {"storage": storage, "study_name": f"{name}-{limit.name}-{limit.value:g}"}
    found = solve(search.solver, problem, budget, on_progress=notify, **options)
    return _with_exact(problem, found, [], "kl")


def _study_name(state: SearchRun, search: ExactOptunaConfig) -> str:
    """A name of its own for everything that makes a study another one; more trials continue a study."""
    config = search.model_dump(exclude={"num_trials", "storage", "study_name"})
    others = [config, state.profile.space.shares, state.config.data.averaging]
    digest = hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()[:8]
    return f"{state.profile.facts['teacher']}-{state.profile.space.name}-{search.sampler}-{digest}"


def _with_exact(problem: Problem, found: Solution, others: list[Solution], criterion: Criterion) -> list[Solution]:
    """Give a solver's solution its exact divergence, and sort it among ``others``."""
    (row,) = problem.need_store("pipeline").evaluate([found.strategy])
    exact = replace(found, divergence_exact=float(row.mean()), per_sample_nats=row)
    runs = found.num_validation_runs + (others[0].num_validation_runs if others else 0)
    return [replace(item, num_validation_runs=runs) for item in best_first([exact, *others], criterion)]


def _uniform_strategy(problem: Problem, budget: Budget) -> Strategy | None:
    """Uniform token reduction under the budget; ``None`` if not even one visual token fits."""
    assignment = uniform_assignment(problem, budget)
    return None if assignment is None else problem.space.strategy(assignment)


def _mean(values: np.ndarray | None) -> float | None:
    return None if values is None else float(values.mean())


# -- the record -----------------------------------------------------------------------------------


def _record(state: SearchRun, results: list[Result], started: datetime, seconds: float) -> Record:
    config, loaded, counts = state.config, state.loaded, state.profile.counts
    problem = state.profile.problem()
    uniform = make_space("uniform", state.profile.dims.num_layers, state.profile.space.tokens.full)
    store = state.profile.store
    assert store is not None
    return Record(
        model=model_info(
            loaded,
            num_visual_tokens=float(np.mean([item.visual for item in counts])),
            num_text_tokens=float(np.mean([item.text for item in counts])),
        ),
        data=DataInfo(
            name=config.data.name,
            num_samples=len(state.data["search"]),
            num_heldout=len(state.data["heldout"]),
            num_test=len(state.data["test"]) if "test" in state.data else 0,
            seed=config.data.seed,
            answers=config.data.answers,
            averaging=config.data.averaging,
            fingerprints={split: data.fingerprint for split, data in state.data.items()},
            sources=[asdict(source) for source in data_sources(config.data)],
            samples_file=SAMPLES_FILE,
        ),
        selector=Named(name=state.selector.name, options=config.selector.options),
        space=Named(name=config.space.name, options=config.space.model_dump(mode="json", exclude={"name"})),
        solver=Named(name=config.search.solver, options=config.search.model_dump(mode="json", exclude={"solver"})),
        results=results,
        floor_ratio=problem.cost_model.floor_ratio,
        front=_front_points(problem),
        uniform_front=_front_points(Problem(uniform, problem.cost_model, state.profile.curves.surrogate(uniform))),
        num_validation_runs=store.num_validation_runs,
        seconds=seconds,
        timings=state.timings,
        provenance=provenance("dop-search", started, config.model_dump(mode="json"), state.search_id),
    )


def _front_points(problem: Problem) -> list[tuple[float, float]]:
    """At most ``MAX_FRONT_POINTS`` points of the surrogate's Pareto front, spread over it."""
    front = pareto_front(problem)
    rows = np.unique(np.linspace(0, len(front) - 1, min(len(front), MAX_FRONT_POINTS)).round().astype(int))
    return [(float(front.cost_ratio[row]), float(front.divergence_nats[row])) for row in rows]


# -- time and progress ----------------------------------------------------------------------------


@contextmanager
def stage(timings: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds spent inside to ``timings[name]``."""
    start = time.perf_counter()
    try:
        yield
    finally:
        timings[name] = timings.get(name, 0.0) + time.perf_counter() - start
