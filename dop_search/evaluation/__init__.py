"""Task scores of full and pruned models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dop_search.evaluation.accuracy import answer_questions, correct_answers
    from dop_search.evaluation.scores import (
        BenchmarkScore,
        SampleScore,
        SuiteScores,
        difference_ci95,
        relative,
        relative_mean,
    )
    from dop_search.evaluation.suite_scores import score_suite
    from dop_search.evaluation.suites import Benchmark, Suite, load_suite, make_suite

_PUBLIC = {
    "answer_questions": "dop_search.evaluation.accuracy",
    "correct_answers": "dop_search.evaluation.accuracy",
    "BenchmarkScore": "dop_search.evaluation.scores",
    "SampleScore": "dop_search.evaluation.scores",
    "SuiteScores": "dop_search.evaluation.scores",
    "difference_ci95": "dop_search.evaluation.scores",
    "relative": "dop_search.evaluation.scores",
    "relative_mean": "dop_search.evaluation.scores",
    "score_suite": "dop_search.evaluation.suite_scores",
    "Benchmark": "dop_search.evaluation.suites",
    "Suite": "dop_search.evaluation.suites",
    "load_suite": "dop_search.evaluation.suites",
    "make_suite": "dop_search.evaluation.suites",
}

__all__ = [
    "Benchmark",
    "BenchmarkScore",
    "SampleScore",
    "Suite",
    "SuiteScores",
    "answer_questions",
    "correct_answers",
    "difference_ci95",
    "load_suite",
    "make_suite",
    "relative",
    "relative_mean",
    "score_suite",
]


def __getattr__(name: str) -> Any:
    """Import public names on first use: scores need no torch."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dop_search.evaluation' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
