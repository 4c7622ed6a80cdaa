"""Scores of a model on a suite, benchmark by benchmark, each measured once."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dop_search.evaluation.lmms.hub import check_suite, revisions_of
from dop_search.evaluation.lmms.quiet import silenced
from dop_search.evaluation.lmms.tasks import task_manager, write_tasks
from dop_search.evaluation.runnable import Runnable, strategy_of
from dop_search.evaluation.scores import BenchmarkScore, SuiteScores, fingerprint
from dop_search.evaluation.suites import Benchmark, Suite, load_suite
from dop_search.models.loading import LoadedModel
from dop_search.pruning.versions import ranking_version
from dop_search.strategy import Strategy
from dop_search.utils.errors import CacheError
from dop_search.utils.network import hub_is_reachable, offline

OnProgress = Callable[[int, int, str], None]
"""Called with (done, total) samples and the benchmark's title."""

JUDGE_SETTINGS = ("MODEL_VERSION", "API_TYPE", "OPENAI_API_URL", "AZURE_ENDPOINT")
"""Environment variables by which lmms-eval's tasks choose the model that judges; ``NUM_IMAGE`` is another of theirs."""


def score_suite(
    loaded: LoadedModel,
    suite: Suite | str,
    strategy: Runnable | None = None,
    *,
    work_dir: str | Path,
    limit: int | None = None,
    resume: bool = True,
    on_progress: OnProgress | None = None,
    revisions: Mapping[str, str] | None = None,
) -> SuiteScores:
    """Score a model, whole or pruned, on every benchmark of a suite by lmms-eval's own task code.

    Every benchmark is saved when it is done (``work_dir/scores/<fingerprint>``: a Parquet file with one row per answer
    and a JSON file) and read back instead of measured again when model, strategy, benchmark, limit and versions agree.
    What lmms-eval prints goes to ``work_dir/lmms_eval.log``.

    Args:
        loaded: the model.
        suite: a suite, its name, or its YAML file.
        strategy: what runs, also a fitted method; ``None``: the full model.
        work_dir: generated tasks, rendered rows, scores and the log.
        limit: most samples per benchmark instead of the suite's; see :func:`scored_rows`.
        resume: read back what is there; ``False`` measures anew.
        on_progress: called with (done, total, title of the benchmark).
        revisions: data set → commit, for several calls that are to score the same data; found out if not given.

    Raises:
        ConfigError: if the suite is malformed, or a program or key is missing.
        DataError: if a data set cannot be had; names the cache variables and the suite that needs none.
        CacheError: if a saved score is corrupt.
        DopError: if our score of the samples differs from lmms-eval's own.
    """
    chosen = suite if isinstance(suite, Suite) else load_suite(suite)
    chosen = chosen if limit is None else dataclasses.replace(chosen, limit=limit)
    run = _Run(loaded, chosen, strategy_of(strategy), Path(work_dir), on_progress)
    scores, marks = run.all(resume, revisions)
    return SuiteScores(
        suite=chosen.name,
        scores=scores,
        model=loaded.name,
        strategy=None if run.strategy is None else run.strategy.key(),
        limit=chosen.limit,
        fingerprint=fingerprint(chosen.name, marks),
    )


@dataclass(frozen=True)
class _Run:
    """One call of :func:`score_suite`."""

    loaded: LoadedModel
    suite: Suite
    strategy: Runnable | None
    work_dir: Path
    on_progress: OnProgress | None

    def all(self, resume: bool, revisions: Mapping[str, str] | None) -> tuple[dict[str, BenchmarkScore], list[str]]:
        """Every benchmark's score, and the fingerprints that they are kept by."""
        check_suite(self.suite)
        revisions = revisions_of(self.suite) if revisions is None else dict(revisions)
        model = self.loaded.fingerprint  # reads a whole tokenizer
        marks = {benchmark.name: self._mark(benchmark, revisions, model) for benchmark in self.suite.benchmarks}
        known = {b.name: self._known(b, marks[b.name]) if resume else None for b in self.suite.benchmarks}
        found = {name: score for name, score in known.items() if score is not None}
        missing = [benchmark for benchmark in self.suite.benchmarks if benchmark.name not in found]
        for benchmark, score in self._measure(missing, revisions) if missing else ():
            score.save(self.work_dir / "scores" / marks[benchmark.name], marks[benchmark.name])
            found[benchmark.name] = score
        return {name: found[name] for name in marks}, list(marks.values())

    def _mark(self, benchmark: Benchmark, revisions: Mapping[str, str], model: str) -> str:
        """Names everything that a benchmark's score depends on.

        But not the batch size, whose rounding can change an answer in half precision: who runs out of memory goes on
        with a smaller one.
        """
        from dop_search.data.benchmarks.rows import rendered_version

        suite = self.suite
        method: list[Any] | None = None if self.strategy is None else [self.strategy.key()]
        if isinstance(self.strategy, Strategy):
            method = [self.strategy.key(), ranking_version(self.strategy)]
        return fingerprint(
            model,
            method,
            dataclasses.asdict(benchmark),
            rendered_version() if suite.source == "rendered" else revisions.get(benchmark.dataset.path),
            {name: os.environ.get(name) for name in JUDGE_SETTINGS} if suite.judge and benchmark.judge else None,
            os.environ.get("NUM_IMAGE"),
            self.loaded.adapter.text_config._attn_implementation,
            suite.limit,
            suite.max_new_tokens,
            [version(name).split("+")[0] for name in ("lmms-eval", "torch", "transformers")],
        )

    def _known(self, benchmark: Benchmark, mark: str) -> BenchmarkScore | None:
        folder = self.work_dir / "scores" / mark
        if not (folder / f"{benchmark.name}.json").exists():
            return None
        score, saved = BenchmarkScore.load(folder, benchmark.name)
        if saved != mark:
            raise CacheError(f"the scores in {str(folder)!r} are of {saved!r}; delete that folder and run again")
        if self.on_progress is not None:
            self.on_progress(score.num_samples, score.num_samples, benchmark.title)
        return score

    def _measure(self, benchmarks: list[Benchmark], revisions: dict[str, str]) -> Any:
        log = self.work_dir / "lmms_eval.log"
        with silenced(log):
            import lmms_eval.evaluator  # noqa: F401  (seconds, and some noise)
        tasks = write_tasks(self.suite, self.work_dir / "tasks", self.work_dir / "data", revisions)
        with silenced(log):
            manager = task_manager(tasks)
        without_network = self.suite.source == "hub" and not hub_is_reachable()
        for benchmark in benchmarks:
            with silenced(log) as seen, offline(without_network):
                score = self._score(benchmark, manager, seen)
            yield benchmark, score

    def _score(self, benchmark: Benchmark, manager: Any, seen: Callable[..., None]) -> BenchmarkScore:
        from dop_search.evaluation.lmms.model import DopLmms
        from dop_search.evaluation.lmms.run import run_benchmark

        def report(done: int, total: int) -> None:
            if self.on_progress is not None:
                seen(self.on_progress, done, total, benchmark.title)

        size = self.suite.batch_size
        model = DopLmms(loaded=self.loaded, strategy=self.strategy, batch_size=size, on_progress=report)
        return run_benchmark(model, self.suite, benchmark, manager)
