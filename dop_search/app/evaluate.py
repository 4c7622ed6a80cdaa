"""The straight line of an evaluation: configuration → model → scores of the full model and of strategies → record."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path

from transformers.utils import logging as transformers_logging

from dop_search.app.begin import begin
from dop_search.app.config import EvalRunConfig
from dop_search.app.provenance import model_info, provenance
from dop_search.app.record import FULL_FOLDER, SAMPLES_FOLDER, SCORES_FILE, EvalRecord, StrategyScores
from dop_search.app.scoring import EVALUATION_FOLDER, SuiteJudge, compare
from dop_search.app.tracking.store import log_evaluation
from dop_search.models.fast_linear import fast_linear
from dop_search.models.loading import load
from dop_search.strategy import Strategy
from dop_search.utils.errors import ConfigError
from dop_search.utils.extensions import import_modules
from dop_search.utils.progress import Progress

PACKAGES = ("dop-search", "torch", "transformers", "lmms-eval", "numpy")


def evaluate(config: EvalRunConfig, run_dir: Path, progress: Progress) -> EvalRecord:
    """Score the full model and every strategy of ``config`` on its suite.

    Writes ``scores.json`` and per-sample outputs to ``run_dir``, and logs to MLflow. Every finished benchmark is kept
    in ``config.cache_dir`` by the content of model, strategy and benchmark: a killed run continues, and the full
    model's scores come from an earlier run if there was one.

    Raises:
        DopError: on anything a user can fix; the message says how.
    """
    started, start = datetime.now(UTC), time.perf_counter()
    import_modules(config.imports)
    strategies = read_strategies(config.strategy)
    begin(config, run_dir, "hydra.run.dir")
    with progress.task(f"load {config.model.name_or_path}"):
        transformers_logging.disable_progress_bar()
        loaded = load(**config.model.model_dump())
    judge = SuiteJudge(loaded, config.suite, Path(config.cache_dir) / EVALUATION_FOLDER, progress)
    with fast_linear(loaded.model):
        full = judge.scores(None)
        full.save(run_dir / SAMPLES_FOLDER / FULL_FOLDER)
        items = []
        for (name, strategy), file in zip(strategies.items(), config.strategy, strict=True):
            pruned = judge.scores(strategy)
            pruned.save(run_dir / SAMPLES_FOLDER / name)
            scores, mean = compare(full, pruned, seed=config.seed)
            ratio = strategy.provenance.get("flops_ratio")
            items.append(
                StrategyScores(
                    name=name,
                    file=file,
                    strategy=strategy,
                    flops_ratio=ratio if isinstance(ratio, float) else None,
                    scores=scores,
                    relative_mean=mean,
                )
            )
    record = EvalRecord(
        model=model_info(loaded),
        suite=judge.info(),
        full={name: score.score for name, score in full.scores.items()},
        units={name: score.unit for name, score in full.scores.items()},
        num_samples={name: score.num_samples for name, score in full.scores.items()},
        strategies=items,
        seconds=time.perf_counter() - start,
        provenance=provenance("dop-eval", started, config.model_dump(mode="json"), packages=PACKAGES),
    )
    record.save(run_dir / SCORES_FILE)
    if config.tracking.backend != "none":
        with progress.task("log to MLflow"):
            log_evaluation(config.tracking, record, run_dir)
    return record


def read_strategies(files: tuple[str, ...]) -> dict[str, Strategy]:
    """Strategies by a name of their own: the file's, with its folder where two files are called alike.

    Raises:
        StrategyError: if a file is no strategy.
        ConfigError: if no name tells two files apart.
    """
    stems = [Path(file).stem for file in files]
    names = []
    for file, stem in zip(files, stems, strict=True):
        is_taken = stems.count(stem) > 1 or stem == FULL_FOLDER
        names.append(f"{Path(file).resolve().parent.name}-{stem}" if is_taken else stem)
    if len(set(names)) < len(names):
        raise ConfigError(f"the strategy files need different names, but {list(files)} give {names}; rename one")
    return {name: Strategy.load(file) for name, file in zip(names, files, strict=True)}
