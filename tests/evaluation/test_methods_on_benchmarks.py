"""Published methods on benchmarks: ``dop-eval method=…`` against lmms-eval's own command and a direct application."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

import dop_search as dop
from dop_search.app.config import EvalRunConfig
from dop_search.app.evaluate import evaluate
from dop_search.app.record import EvalRecord
from dop_search.app.scoring import EVALUATION_FOLDER
from dop_search.data.benchmarks import benchmark_rows
from dop_search.data.samples import Sample
from dop_search.data.validation import validation_set
from dop_search.evaluation.accuracy import generate_answers
from dop_search.utils.errors import DopError
from dop_search.utils.progress import Progress

METHODS = ("fastv", "uniform@divprune", "short_lvlm")
LIMIT, NUM_SAMPLES, RATIO = 4, 3, 0.3


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[EvalRunConfig, Path, EvalRecord]:
    path = tmp_path_factory.mktemp("methods")
    config = EvalRunConfig.model_validate(
        {
            "eval": {
                "name": "pocket13",
                "source": "rendered",
                "benchmarks": ["gqa"],
                "max_new_tokens": 8,
                "limit": LIMIT,
            },
            "method": list(METHODS),
            "flops_ratio": RATIO,
            "data": {"num_samples": NUM_SAMPLES},
            "tracking": {"backend": "none"},
            "cache_dir": str(path / "cache"),
        }
    )
    return config, path, evaluate(config, path / "run", Progress())


def _answers(path: Path, name: str) -> dict[int, str]:
    table = pd.read_parquet(path / "run" / "samples" / name / "gqa.parquet")
    return dict(zip(table["doc_id"], table["prediction"], strict=True))


@pytest.mark.slow
def test_lmms_eval_fits_the_same_method_and_gives_the_same_scores(scored, pocket) -> None:
    from lmms_eval.models import get_model

    from dop_search.evaluation.lmms.run import run_benchmark
    from dop_search.evaluation.lmms.tasks import task_manager

    config, path, record = scored
    manager = task_manager(Path(config.cache_dir) / EVALUATION_FOLDER / "tasks" / "pocket13")
    for name, item in zip(METHODS, record.strategies, strict=True):
        text = f"pretrained=pocket,method={name},flops_ratio={RATIO},num_samples={NUM_SAMPLES},batch_size=4,device=cpu"
        model = get_model("dop", force_simple=True).create_from_arg_string(text, {})
        score = run_benchmark(model, config.eval, config.eval.benchmarks[0], manager)
        assert score.score == item.scores["gqa"].pruned
        assert {sample.doc_id: sample.prediction for sample in score.samples} == _answers(path, item.name)
    with pytest.raises(DopError, match="give flops_ratio"):
        get_model("dop", force_simple=True).create_from_arg_string("pretrained=pocket,method=fastv,device=cpu", {})


@pytest.mark.slow
def test_answers_are_those_of_the_method_applied_by_hand(scored, pocket) -> None:
    """And they are not the full model's; what a strategy expresses lies in a file that scores the same."""
    _, path, record = scored
    rows, text = benchmark_rows("gqa", 100), "\nAnswer the question using a single word or phrase."
    changed = 0
    for method, item in zip(METHODS, record.strategies, strict=True):
        said = _answers(path, item.name)
        samples = [Sample(str(i), rows[i]["image"], rows[i]["question"] + text, ("x",), "f") for i in said]
        fitted = dop.fit(method, pocket, validation_set("pocket", NUM_SAMPLES), flops_ratio=RATIO)
        with fitted.apply(pocket.model):
            assert generate_answers(pocket, samples, max_new_tokens=8) == list(said.values())
        changed += _answers(path, "full") != said
        assert (item.name, item.flops_ratio) == (f"{method}-{RATIO}", fitted.flops_ratio)
        assert item.method is not None
        assert item.method["hyperparameters"] == dict(fitted.hyperparameters)
        if item.strategy is None:
            assert (method, item.file) == ("short_lvlm", "")
        else:
            assert dop.Strategy.load(item.file) == item.strategy == fitted.strategy
    assert changed
    assert EvalRecord.load(path / "run") == record
