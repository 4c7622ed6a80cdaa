"""The straight line of an evaluation: configuration → model → scores of the full model and of strategies → record."""

from __future__ import annotations

import itertools
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dop_search.app.begin import begin
from dop_search.app.config import EvalRunConfig, SearchConfig
from dop_search.app.data_checks import check_data
from dop_search.app.provenance import model_info, provenance
from dop_search.app.record import FULL_FOLDER, SAMPLES_FOLDER, SCORES_FILE, EvalRecord, StrategyScores
from dop_search.app.results import plain
from dop_search.app.scoring import EVALUATION_FOLDER, SuiteJudge, compare
from dop_search.app.tracking.store import log_evaluation
from dop_search.app.workbench import Workbench
from dop_search.baselines import FittedMethod, parse_method
from dop_search.models.fast_linear import fast_linear
from dop_search.models.loading import LoadedModel
from dop_search.strategy import Strategy
from dop_search.utils.errors import ConfigError
from dop_search.utils.progress import Progress
from dop_search.utils.registry import import_modules

METHODS_FOLDER = "methods"


def evaluate(config: EvalRunConfig, run_dir: Path, progress: Progress) -> EvalRecord:
    """Score the full model, every strategy of ``config`` and every method, fitted on search samples, on its suite.

    Writes ``scores.json`` and per-sample outputs to ``run_dir``, and logs to MLflow. Every finished benchmark is kept
    in ``config.cache_dir`` by the content of model, strategy and benchmark: a killed run continues, and the full
    model's scores come from an earlier run if there was one.
    """
    started, start = datetime.now(UTC), time.perf_counter()
    import_modules(config.imports)
    strategies = read_strategies(config.strategy)
    for name in config.method:
        parse_method(name)  # a misspelt name is an error before loading
    if config.method:
        check_data(config.data, config.eval, ("search",), ())
    loaded = begin(config, run_dir, "hydra.run.dir", progress)
    judge = SuiteJudge(loaded, config.eval, Path(config.cache_dir) / EVALUATION_FOLDER, progress)
    items = []
    judged: list[_Judged] = []
    for (name, strategy), file in zip(strategies.items(), config.strategy, strict=True):
        ratio = strategy.provenance.get("flops_ratio")
        known = ratio if isinstance(ratio, float) else None
        judged.append((strategy, {"name": name, "file": file, "strategy": strategy, "flops_ratio": known}))
    with fast_linear(loaded.model):
        judged += _fit(config, loaded, run_dir, progress)
        full = judge.scores(None)
        full.save(run_dir / SAMPLES_FOLDER / FULL_FOLDER)
        for runs, about in judged:
            pruned = judge.scores(runs)
            pruned.save(run_dir / SAMPLES_FOLDER / about["name"])
            scores, mean = compare(full, pruned, seed=config.seed)
            items.append(StrategyScores(**about, scores=scores, relative_mean=mean))
    record = EvalRecord(
        model=model_info(loaded),
        suite=judge.info(),
        full={name: score.score for name, score in full.scores.items()},
        units={name: score.unit for name, score in full.scores.items()},
        num_samples={name: score.num_samples for name, score in full.scores.items()},
        strategies=items,
        seconds=time.perf_counter() - start,
        provenance=provenance("dop-eval", started, config.model_dump(mode="json")),
    )
    record.save(run_dir / SCORES_FILE)
    if config.tracking.backend != "none":
        with progress.task("log to MLflow"):
            log_evaluation(config.tracking, record, run_dir)
    return record


_Judged = tuple[Strategy | FittedMethod, dict[str, Any]]
"""What is scored, and what the record says of it, see :class:`StrategyScores`."""


def _fit(config: EvalRunConfig, loaded: LoadedModel, run_dir: Path, progress: Progress) -> list[_Judged]:
    """Every method at every ratio, fitted on the search samples; what a strategy expresses is saved."""
    if not config.method:
        return []
    shared = {name: getattr(config, name) for name in ("model", "data", "selector", "cache_dir", "seed", "num_threads")}
    bench = Workbench(SearchConfig(**shared), loaded, progress)
    judged: list[_Judged] = []
    for method, ratio in itertools.product(config.method, config.flops_ratio):
        name, fitted, file = f"{method}-{ratio:g}", bench.fit(method, ratio), ""
        if fitted.strategy is not None:
            file = str(run_dir / METHODS_FOLDER / f"{name}.json")
            fitted.save(Path(file))
        about = {"flops_ratio": fitted.flops_ratio, "method": plain(fitted.facts)}
        judged.append((fitted, {"name": name, "file": file, "strategy": fitted.strategy, **about}))
    return judged


def read_strategies(files: tuple[str, ...]) -> dict[str, Strategy]:
    """Strategies by a name of their own: the file's, with its folder where two files are called alike."""
    stems = [Path(file).stem for file in files]
    names = []
    for file, stem in zip(files, stems, strict=True):
        is_taken = stems.count(stem) > 1 or stem == FULL_FOLDER
        names.append(f"{Path(file).resolve().parent.name}-{stem}" if is_taken else stem)
    if len(set(names)) < len(names):
        raise ConfigError(f"the strategy files need different names, but {list(files)} give {names}; rename one")
    return {name: Strategy.load(file) for name, file in zip(names, files, strict=True)}
