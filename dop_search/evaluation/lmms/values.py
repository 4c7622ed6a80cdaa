"""From lmms-eval's logged samples to what each one is worth, by lmms-eval's own code wherever it decides."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from dop_search.evaluation.aggregates import SampleScore
from dop_search.evaluation.suites import Benchmark, Suite
from dop_search.utils.errors import DopError

Logged: TypeAlias = dict[str, Any]
"""One entry of ``results["samples"][task]``."""
Reader: TypeAlias = Callable[[Suite, Any, Sequence[Any]], list[float]]
"""What answers were worth, by what the task's ``process_results`` gave for each."""


def sample_scores(
    suite: Suite, benchmark: Benchmark, task: Any, logged: Sequence[Logged], rows: Sequence[int]
) -> tuple[SampleScore, ...]:
    """What each logged answer of a task was worth; ``rows``: for each of its rows, the place in the benchmark's split.

    Raises:
        DopError: if a value is not a number between 0 and 1 (10 for captions).
    """
    if benchmark.value not in VALUES:
        raise DopError(f"benchmark {benchmark.name!r}: `value` must be one of {list(VALUES)}, got {benchmark.value!r}")
    values = VALUES[benchmark.value](suite, task, [_metric(benchmark, sample) for sample in logged])
    scores = []
    for sample, value in zip(logged, values, strict=True):
        if not 0 <= value <= 10:
            raise DopError(f"{benchmark.name}: sample {sample['doc_id']} is worth {value}")
        scores.append(
            SampleScore(
                doc_id=int(rows[sample["doc_id"]]),
                prediction=_text(sample["filtered_resps"][0]),
                targets=_targets(benchmark, sample),
                value=float(value),
                keys=tuple("/".join(str(sample["doc"][column]) for column in key) for key in benchmark.keys),
            )
        )
    return tuple(scores)


def lmms_score(benchmark: Benchmark, results: dict[str, Any], num_samples: int) -> float | None:
    """lmms-eval's own number in the benchmark's usual unit; ``None`` where it was not asked for."""
    found = [float(results[name]) for name in benchmark.metrics if isinstance(results.get(name), (int, float))]
    if not found:
        return None
    total = sum(found) if benchmark.aggregate == "mme" else sum(found) / len(found)
    if benchmark.aggregate == "mean_of_1000":  # lmms-eval divides the right answers by 1000, however many were asked
        return total * 1000.0 * 1000.0 / num_samples
    return total if benchmark.aggregate == "mme" or benchmark.value in _PER_CENT else 100.0 * total


_PER_CENT = frozenset({"mmbench_en", "mmbench_cn", "pred_answer"})
"""lmms-eval gives their score in per cent already."""


def _text(answer: Any) -> str:
    return str(answer[0] if isinstance(answer, (list, tuple)) else answer)


def _targets(benchmark: Benchmark, sample: Logged) -> tuple[str, ...]:
    target = sample["target"] if benchmark.target is None else sample["doc"][benchmark.target]
    items = target if isinstance(target, (list, tuple)) else [target]
    return tuple(dict.fromkeys(str(item) for item in items))


def _metric(benchmark: Benchmark, sample: Logged) -> Any:
    """What ``process_results`` gave for the first of the benchmark's metrics that it gave anything for."""
    for name in benchmark.metrics:
        value = sample.get(name.split(",")[0])
        if value is not None:
            return value
    raise DopError(f"{benchmark.name}: sample {sample['doc_id']} has none of the metrics {list(benchmark.metrics)}")


def _predicted(suite: Suite, task: Any, facts: Sequence[Any]) -> list[float]:
    return [float(str(fact["pred_answer"]).lower() == str(fact["answer"]).lower()) for fact in facts]


def _mmbench(language: str) -> Reader:
    def values(suite: Suite, task: Any, facts: Sequence[Any]) -> list[float]:
        import pandas as pd

        evaluator = _mmbench_evaluator(language)
        found = []
        for fact in facts:
            item = {**fact, "prediction": str(fact["prediction"])}
            answers = {item["index"]: item["answer"]}
            found.append(float(evaluator.eval_sub_data(pd.DataFrame([item]), answers, static_only=not suite.judge)))
        return found

    return values


def _mmbench_evaluator(language: str) -> Any:
    return importlib.import_module(f"lmms_eval.tasks.mmbench.{language}_utils").mmbench_evaluator


def static_mmbench_en(results: Sequence[Any]) -> float:
    """lmms-eval's evaluation without a judge, in per cent."""
    return float(_mmbench_evaluator("en").eval_result(results, eval_method="static")[0]) * 100.0


def static_mmbench_cn(results: Sequence[Any]) -> float:
    """As :func:`static_mmbench_en`; lmms-eval has no task for it in Chinese."""
    return float(_mmbench_evaluator("cn").eval_result(results, eval_method="static")[0]) * 100.0


def _hallusionbench(suite: Suite, task: Any, facts: Sequence[Any]) -> list[float]:
    """The aggregation has written its verdict into each sample: the judge's, or whether it found "yes"."""
    if suite.judge:
        return [float(fact["correct"]) for fact in facts]
    return [float(fact["answer"] == fact["gt_answer"]) for fact in facts]


def _mmmu(suite: Suite, task: Any, facts: Sequence[Any]) -> list[float]:
    """The task's own aggregation, of one sample at a time."""
    aggregate = task.aggregation()["mmmu_acc"]
    return [float(aggregate([fact])) for fact in facts]


def _cider(suite: Suite, task: Any, facts: Sequence[Any]) -> list[float]:
    """CIDEr per image, with the document frequencies of all references here; its mean is the corpus score."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    truth = {i: [{"caption": caption} for caption in fact["answer"]] for i, fact in enumerate(facts)}
    said = {i: [{"caption": fact["pred"]}] for i, fact in enumerate(facts)}
    tokenizer = PTBTokenizer()
    _, per_image = Cider().compute_score(tokenizer.tokenize(truth), tokenizer.tokenize(said))
    return [float(value) for value in per_image]


VALUES: dict[str, Reader] = {
    "number": lambda suite, task, facts: [float(fact) for fact in facts],
    "score": lambda suite, task, facts: [float(fact["score"]) for fact in facts],
    "pred_answer": _predicted,
    "mmbench_en": _mmbench("en"),
    "mmbench_cn": _mmbench("cn"),
    "hallusionbench": _hallusionbench,
    "mmmu": _mmmu,
    "nocaps": _cider,
    "textcaps": _cider,
}
"""``Benchmark.value`` → reader."""
