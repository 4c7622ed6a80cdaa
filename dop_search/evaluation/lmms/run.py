"""One benchmark, run by lmms-eval on any of its models, and the score that its samples make."""

from __future__ import annotations

import math
import tempfile
from types import SimpleNamespace
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.evaluator import simple_evaluate

from dop_search.evaluation.lmms.tasks import keep_rows, load_task, scored_rows, task_name
from dop_search.evaluation.lmms.values import lmms_score, sample_scores
from dop_search.evaluation.scores import BenchmarkScore
from dop_search.evaluation.suites import Benchmark, Suite
from dop_search.utils.errors import DataError, DopError

_TOLERANCE = 1e-3
"""lmms-eval rounds some scores (HallusionBench: 4 decimals of a per cent; MMMU: 5 of a fraction)."""


def run_benchmark(model: lmms, suite: Suite, benchmark: Benchmark, manager: Any) -> BenchmarkScore:
    """Let lmms-eval ask ``model`` every row that ``suite.limit`` leaves, and score the answers.

    Files that metrics write go to a folder that is deleted. Random number generators are left alone. ``manager`` is of
    :func:`task_manager`, knowing what :func:`write_tasks` wrote for the suite.

    Raises:
        DataError: if a video is missing.
        DopError: if our score of the samples differs from lmms-eval's own, or in one of several processes.
    """
    if model.world_size > 1:
        raise DopError(
            f"a suite is scored by one process, but this is one of {model.world_size} (WORLD_SIZE is set); start it "
            "without torchrun or accelerate launch, or let lmms-eval itself share the rows: lmms-eval --model dop"
        )
    task = load_task(suite, benchmark, manager)
    rows = scored_rows(benchmark, task.eval_docs_no_media, suite.limit)
    keep_rows(task, task.config.test_split or task.config.validation_split, rows)
    with tempfile.TemporaryDirectory(prefix="dop_search-") as scratch:
        try:
            results: Any = simple_evaluate(
                model=model,
                tasks=[task],
                task_manager=manager,
                log_samples=True,
                bootstrap_iters=0,
                verbosity="ERROR",
                random_seed=None,
                numpy_random_seed=None,
                torch_random_seed=None,
                cli_args=SimpleNamespace(output_path=scratch, process_with_media=False),
                process_docs_parallel=1,
            )
        except SystemExit as error:  # how lmms-eval's video tasks say that a file is missing
            raise DataError(f"{benchmark.title}: {error}") from error
        name = task_name(suite, benchmark)
        samples = sample_scores(suite, benchmark, task, results["samples"][name], rows)
    score = BenchmarkScore.of(benchmark.name, benchmark.unit, benchmark.aggregate, samples)
    _compare(suite, benchmark, score, lmms_score(benchmark, results["results"][name], score.num_samples))
    return score


def _compare(suite: Suite, benchmark: Benchmark, score: BenchmarkScore, theirs: float | None) -> None:
    if theirs is None or (suite.limit is not None and benchmark.aggregate == "category_mean"):
        return  # not asked for; or lmms-eval counts the categories that the limit left out as 0
    if not math.isclose(theirs, score.score, rel_tol=1e-6, abs_tol=_TOLERANCE):
        raise DopError(
            f"{benchmark.title}: lmms-eval gives {theirs}, but its samples make {score.score} by "
            f"{benchmark.aggregate!r}; `aggregate` or `value` in conf/benchmarks.yaml does not fit the task"
        )
