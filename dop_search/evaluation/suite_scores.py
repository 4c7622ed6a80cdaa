"""Scores of a model on a suite, benchmark by benchmark, each measured once."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dop_search.errors import CacheError, DataError, DopError
from dop_search.evaluation.lmms.hub import check_suite, offline, revisions_of
from dop_search.evaluation.lmms.quiet import Silenced, silenced
from dop_search.evaluation.lmms.tasks import keep_rows, load_task, scored_rows, task_manager, task_name, write_tasks
from dop_search.evaluation.lmms.values import lmms_score, sample_scores
from dop_search.evaluation.scores import BenchmarkScore, SuiteScores, fingerprint
from dop_search.evaluation.suites import Benchmark, Suite, load_suite
from dop_search.models.loading import LoadedModel, hub_is_reachable
from dop_search.strategy import Strategy

__all__ = ["score_suite"]

OnProgress = Callable[[int, int, str], None]
"""Called with (done, total) samples and the benchmark's title."""

_TOLERANCE = 1e-3
"""lmms-eval rounds some scores (HallusionBench: 4 decimals of a per cent; MMMU: 5 of a fraction)."""


def score_suite(
    loaded: LoadedModel,
    suite: Suite | str,
    strategy: Strategy | None = None,
    *,
    work_dir: str | Path,
    limit: int | None = None,
    batch_size: int | None = None,
    resume: bool = True,
    on_progress: OnProgress | None = None,
) -> SuiteScores:
    """Score a model, whole or pruned, on every benchmark of a suite by lmms-eval's own task code.

    Every benchmark is saved when it is done (``work_dir/scores/<fingerprint>``: a Parquet file with one row per answer
    and a JSON file) and read back instead of measured again when model, strategy, benchmark, limit and versions agree.
    What lmms-eval prints goes to ``work_dir/lmms_eval.log``.

    Args:
        loaded: the model.
        suite: a suite, its name, or its YAML file.
        strategy: what runs; ``None``: the full model.
        work_dir: generated tasks, rendered rows, scores and the log.
        limit: most samples per benchmark instead of the suite's; see :func:`scored_rows`.
        batch_size: samples per generation call instead of the suite's.
        resume: read back what is there; ``False`` measures anew.
        on_progress: called with (done, total, title of the benchmark).

    Raises:
        ConfigError: if the suite is malformed, or a program or key is missing.
        DataError: if a data set cannot be had; names the cache variables and the suite that needs none.
        CacheError: if a saved score is corrupt.
        DopError: if our score of the samples differs from lmms-eval's own.
    """
    chosen = suite if isinstance(suite, Suite) else load_suite(suite)
    if limit is not None:
        chosen = dataclasses.replace(chosen, limit=limit)
    if batch_size is not None:
        chosen = dataclasses.replace(chosen, batch_size=batch_size)
    run = _Run(loaded, chosen, _without_emptiness(strategy), Path(work_dir), on_progress)
    scores, marks = run.all(resume)
    return SuiteScores(
        suite=chosen.name,
        scores=scores,
        model=loaded.name,
        strategy=None if run.strategy is None else run.strategy.key(),
        limit=chosen.limit,
        fingerprint=fingerprint(chosen.name, marks),
    )


def _without_emptiness(strategy: Strategy | None) -> Strategy | None:
    """The strategy that skips nothing is the full model."""
    return None if strategy is None or strategy.is_empty else strategy


class _Run:
    """One call of :func:`score_suite`."""

    def __init__(
        self,
        loaded: LoadedModel,
        suite: Suite,
        strategy: Strategy | None,
        work_dir: Path,
        on_progress: OnProgress | None,
    ) -> None:
        self.loaded, self.suite, self.strategy = loaded, suite, strategy
        self.work_dir, self.on_progress = work_dir, on_progress

    def all(self, resume: bool) -> tuple[dict[str, BenchmarkScore], list[str]]:
        """Every benchmark's score, and the fingerprints that they are kept by."""
        check_suite(self.suite)
        revisions = revisions_of(self.suite)
        marks = {benchmark.name: self._mark(benchmark, revisions) for benchmark in self.suite.benchmarks}
        found: dict[str, BenchmarkScore] = {}
        for benchmark in self.suite.benchmarks:
            known = self._known(benchmark, marks[benchmark.name]) if resume else None
            if known is not None:
                found[benchmark.name] = known
        missing = [benchmark for benchmark in self.suite.benchmarks if benchmark.name not in found]
        if missing:
            for benchmark, score in self._measure(missing, revisions):
                score.save(self._folder(marks[benchmark.name]), marks[benchmark.name])
                found[benchmark.name] = score
        return {b.name: found[b.name] for b in self.suite.benchmarks}, list(marks.values())

    def _mark(self, benchmark: Benchmark, revisions: Mapping[str, str]) -> str:
        """Names everything that a benchmark's score depends on."""
        from dop_search.data.benchmarks.parquet import rendered_version

        suite = self.suite
        return fingerprint(
            self.loaded.weights_fingerprint,
            None if self.strategy is None else self.strategy.key(),
            dataclasses.asdict(benchmark),
            rendered_version() if suite.source == "rendered" else revisions.get(benchmark.dataset.path),
            suite.judge and benchmark.judge,
            suite.limit,
            suite.max_new_tokens,
            [version(name).split("+")[0] for name in ("lmms-eval", "torch", "transformers")],
        )

    def _folder(self, mark: str) -> Path:
        return self.work_dir / "scores" / mark

    def _known(self, benchmark: Benchmark, mark: str) -> BenchmarkScore | None:
        folder = self._folder(mark)
        if not (folder / f"{benchmark.name}.json").exists():
            return None
        score, saved = BenchmarkScore.load(folder, benchmark.name)
        if saved != mark:
            raise CacheError(f"the scores in {str(folder)!r} are of {saved!r}; delete that folder and run again")
        if self.on_progress is not None:
            self.on_progress(score.num_samples, score.num_samples, benchmark.title)
        return score

    def _measure(self, benchmarks: list[Benchmark], revisions: dict[str, str]) -> Any:
        """Yield each benchmark with its score."""
        log = self.work_dir / "lmms_eval.log"
        with silenced(log):
            import lmms_eval.evaluator  # noqa: F401  (seconds, and some noise)
        tasks = write_tasks(self.suite, self.work_dir / "tasks", self.work_dir / "data", revisions)
        with silenced(log):
            manager = task_manager(tasks)
        without_network = self.suite.source == "hub" and not hub_is_reachable()
        for benchmark in benchmarks:
            with silenced(log) as before, offline(without_network):
                score = self._score(benchmark, manager, before)
            yield benchmark, score

    def _score(self, benchmark: Benchmark, manager: Any, before: Silenced) -> BenchmarkScore:
        from lmms_eval.evaluator import simple_evaluate

        from dop_search.evaluation.lmms.model import DopLmms

        task = load_task(self.suite, benchmark, manager)
        split = task.config.test_split or task.config.validation_split
        rows = scored_rows(benchmark, task.eval_docs_no_media, self.suite.limit)
        keep_rows(task, split, rows)
        report = None
        if self.on_progress is not None:
            tell = before.aloud(self.on_progress)
            tell(0, len(rows), benchmark.title)
            report = lambda done, total: tell(done, total, benchmark.title)  # noqa: E731
        model = DopLmms(
            loaded=self.loaded, strategy=self.strategy, batch_size=self.suite.batch_size, on_progress=report
        )
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
            name = task_name(self.suite, benchmark)
            samples = sample_scores(self.suite, benchmark, task, results["samples"][name], rows)
        score = BenchmarkScore.of(benchmark.name, benchmark.unit, benchmark.aggregate, samples)
        partial = (
            self.suite.limit is not None and benchmark.aggregate == "category_mean"
        )  # theirs counts absent ones as 0
        theirs = None if partial else lmms_score(benchmark, results["results"][name], score.num_samples)
        if theirs is not None and not math.isclose(theirs, score.score, rel_tol=1e-6, abs_tol=_TOLERANCE):
            raise DopError(
                f"{benchmark.title}: lmms-eval gives {theirs}, but its samples make {score.score} by "
                f"{benchmark.aggregate!r}; `aggregate` or `value` in conf/benchmarks.yaml does not fit the task"
            )
        return score
