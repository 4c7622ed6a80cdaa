"""What a score is: one number per benchmark with the samples it comes from, and comparisons of two models."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dop_search.evaluation.aggregates import AGGREGATES, SampleScore
from dop_search.utils.errors import CacheError, DopError
from dop_search.utils.files import write_atomic
from dop_search.utils.statistics import stratified_bootstrap_ci95
from dop_search.utils.versioned import Format, write_json

FORMAT = Format("a file of scores", "dop_search.scores", 1, "run the evaluation again")
_AS_JSON: dict[str, Any] = {"ensure_ascii": False, "allow_nan": False}


@dataclass(frozen=True)
class BenchmarkScore:
    """One model's score on one benchmark, in its usual unit (``"%"`` or ``"points"``), with what each sample was worth,
    ordered by ``doc_id``; DopError unless ``AGGREGATES[aggregate](samples) == score``."""

    benchmark: str
    score: float
    unit: str
    num_samples: int
    samples: tuple[SampleScore, ...] = field(repr=False)
    aggregate: str

    def __post_init__(self) -> None:
        if self.num_samples != len(self.samples):
            raise DopError(f"{self.benchmark}: num_samples is {self.num_samples}, but there are {len(self.samples)}")
        again = AGGREGATES.find(self.aggregate)(self.samples)
        if not math.isclose(again, self.score, rel_tol=1e-6, abs_tol=1e-6):
            raise DopError(
                f"{self.benchmark}: the score is given as {self.score}, but the aggregate {self.aggregate!r} of its "
                f"{self.num_samples} samples is {again}"
            )

    @classmethod
    def of(cls, benchmark: str, unit: str, aggregate: str, samples: tuple[SampleScore, ...]) -> BenchmarkScore:
        """The score that ``samples`` make."""
        ordered = tuple(sorted(samples, key=lambda sample: sample.doc_id))
        score = AGGREGATES.find(aggregate)(ordered)
        return cls(benchmark, score, unit, len(ordered), ordered, aggregate)

    def save(self, folder: Path, fingerprint: str) -> None:
        """Write ``<benchmark>.parquet`` (one row per sample), then ``<benchmark>.json``, which says that it is done."""
        import pandas as pd

        rows = pd.DataFrame([asdict(sample) for sample in self.samples])
        write_atomic(folder / f"{self.benchmark}.parquet", rows.to_parquet)
        data = {**FORMAT.stamp, "fingerprint": fingerprint, "benchmark": self.benchmark, **self.summary}
        write_json(folder / f"{self.benchmark}.json", data, **_AS_JSON)

    @property
    def summary(self) -> dict[str, Any]:
        """The score without its samples, for JSON."""
        return {name: getattr(self, name) for name in ("score", "unit", "num_samples", "aggregate")}

    @classmethod
    def load(cls, folder: Path, benchmark: str) -> tuple[BenchmarkScore, str]:
        """What :meth:`save` wrote: score and fingerprint.

        Raises:
            CacheError: if the files are corrupt or contradict each other.
        """
        import pandas as pd

        summary = FORMAT.read(folder / f"{benchmark}.json")
        try:
            table = pd.read_parquet(folder / f"{benchmark}.parquet")
            samples = tuple(
                SampleScore(int(row.doc_id), row.prediction, tuple(row.targets), float(row.value), tuple(row.keys))
                for row in table.itertuples(index=False)
            )
            facts = {name: summary[name] for name in ("benchmark", "score", "unit", "num_samples", "aggregate")}
            score = cls(samples=samples, **facts)
        except (AttributeError, OSError, KeyError, TypeError, ValueError) as error:
            raise CacheError(
                f"the scores of {benchmark!r} in {str(folder)!r} are corrupt ({error}); delete {benchmark}.json and "
                f"{benchmark}.parquet there and run again"
            ) from error
        return score, summary["fingerprint"]


@dataclass(frozen=True)
class SuiteScores:
    """One model's scores on a suite.

    Attributes:
        scores: benchmark → score, in the suite's order.
        strategy: ``Strategy.key()``, or ``None`` for the full model.
        limit: most samples per benchmark, or ``None``.
        fingerprint: of model, strategy, suite and limit; equal for runs that must give equal scores.
    """

    suite: str
    scores: Mapping[str, BenchmarkScore]
    model: str = ""
    strategy: str | None = None
    limit: int | None = None
    fingerprint: str = ""

    def save(self, folder: str | Path) -> Path:
        """Write ``scores.json`` and, per benchmark, its samples; returns the path of ``scores.json``."""
        folder = Path(folder)
        for score in self.scores.values():
            score.save(folder, self.fingerprint)
        path = folder / "scores.json"
        write_json(path, self.to_json(), **_AS_JSON)
        return path

    def to_json(self) -> dict[str, Any]:
        """The scores without their samples."""
        return {
            **FORMAT.stamp,
            "suite": self.suite,
            "model": self.model,
            "strategy": self.strategy,
            "limit": self.limit,
            "fingerprint": self.fingerprint,
            "scores": {name: score.summary for name, score in self.scores.items()},
        }

    @classmethod
    def load(cls, folder: str | Path) -> SuiteScores:
        """What :meth:`save` wrote, with the samples; CacheError if a file is missing, corrupt or of another version."""
        folder = Path(folder)
        data = FORMAT.read(folder / "scores.json")
        scores = {name: BenchmarkScore.load(folder, name)[0] for name in data["scores"]}
        return cls(data["suite"], scores, data["model"], data["strategy"], data["limit"], data["fingerprint"])


def fingerprint(*parts: Any) -> str:
    """16 hex digits of the SHA-256 over JSON-pure ``parts`` and this format's version."""
    text = json.dumps([FORMAT.name, FORMAT.version, *parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def relative(pruned: SuiteScores, full: SuiteScores) -> dict[str, float]:
    """Per cent of the full model's score that is left, per benchmark, NaN where that is 0; DopError on others."""
    if set(pruned.scores) != set(full.scores):
        raise DopError(
            f"scores can be compared on the same benchmarks only, but one side has {list(pruned.scores)} and the other "
            f"{list(full.scores)}"
        )
    return {
        name: 100.0 * score.score / full.scores[name].score if full.scores[name].score else math.nan
        for name, score in pruned.scores.items()
    }


def relative_mean(pruned: SuiteScores, full: SuiteScores) -> float:
    """The literature's relative average: the mean over benchmarks of the per cent of the full model's score.

    NaN if the full model scores 0 on a benchmark; see :func:`relative` for errors.
    """
    return float(np.mean(list(relative(pruned, full).values())))


def difference_ci95(
    pruned: BenchmarkScore, full: BenchmarkScore, seed: int = 0, num_resamples: int = 2000, smoothed: bool = True
) -> tuple[float, float]:
    """95 % interval of ``pruned.score - full.score``, in the benchmark's unit.

    A paired bootstrap: both models are scored anew on the same resample of units (samples; pairs for MME, questions
    with all their rotations for MMBench, sets for HallusionBench), drawn within each category where the score is a sum
    or mean over categories. Elsewhere two units come on top, which either model alone gets right (A. Agresti and
    Y. Min, *Simple improved confidence intervals for comparing matched proportions*, Statistics in Medicine 24, 2005):
    without them (``smoothed=False``, for what is averaged over many benchmarks, where they would add up) an interval is
    too narrow, or empty, where the models differ in a handful of units.

    Raises:
        DopError: if the two were not measured on the same rows in the same way.
    """
    if (pruned.benchmark, pruned.aggregate) != (full.benchmark, full.aggregate):
        raise DopError(
            f"a difference needs the same benchmark and aggregate, but got {pruned.benchmark!r} ({pruned.aggregate}) "
            f"and {full.benchmark!r} ({full.aggregate})"
        )
    aggregate = AGGREGATES.find(full.aggregate)
    sides = [aggregate.checked_units(side.samples) for side in (pruned, full)]
    if sides[0].names != sides[1].names:
        missing = sorted(set(sides[0].names) ^ set(sides[1].names))[:5]
        raise DopError(
            f"{full.benchmark}: a paired comparison needs the same rows on both sides, but {len(sides[0].names)} and "
            f"{len(sides[1].names)} differ, e.g. in {missing}; measure both with the same limit"
        )
    both = np.concatenate([side.statistics for side in sides], axis=1)
    num_statistics, strata = sides[0].statistics.shape[1], sides[0].strata
    if smoothed and aggregate.right:
        right, wrong = aggregate.right, aggregate.wrong
        both = np.concatenate([both, [(*right, *wrong), (*wrong, *right)]])
        strata = np.zeros(len(both), dtype=np.int64)
    return stratified_bootstrap_ci95(
        both,
        strata,
        lambda sums: aggregate.combine(sums[:, :num_statistics]) - aggregate.combine(sums[:, num_statistics:]),
        seed,
        num_resamples,
    )
