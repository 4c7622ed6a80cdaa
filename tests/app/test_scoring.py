"""Scores of found strategies: compared with the full model and uniform reduction, each model state measured once."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.pictures import save_nothing
from support.records import example_record

from dop_search.app.config import SearchConfig
from dop_search.app.data_checks import refuse_scored_data
from dop_search.app.record import RECORD_FILE, SAMPLES_FILE, Record
from dop_search.app.scoring import SuiteJudge, compare
from dop_search.app.search import run
from dop_search.evaluation.aggregates import SampleScore
from dop_search.evaluation.scores import BenchmarkScore, SuiteScores
from dop_search.evaluation.suites import Suite, load_suite
from dop_search.strategy import Strategy
from dop_search.utils.errors import DataError, DopError
from dop_search.utils.progress import Progress

ROOT = Path(__file__).parents[2]


def benchmark(name: str, values: list[float]) -> BenchmarkScore:
    samples = tuple(SampleScore(i, "yes" if value else "no", ("yes",), value) for i, value in enumerate(values))
    return BenchmarkScore.of(name, "%", "mean", samples)


def suite_scores(**values: list[float]) -> SuiteScores:
    return SuiteScores("invented", {name: benchmark(name, list(items)) for name, items in values.items()})


def test_compare_against_hand_made_numbers() -> None:
    full = suite_scores(a=[1, 1, 1, 0], b=[1, 1, 0, 0])
    pruned = suite_scores(a=[1, 1, 0, 0], b=[1, 1, 1, 0])
    uniform = suite_scores(a=[0, 0, 0, 0], b=[1, 1, 0, 0])
    scores, mean = compare(full, pruned, uniform)
    assert (scores["a"].full, scores["a"].pruned, scores["a"].uniform) == (75.0, 50.0, 0.0)
    assert mean.pruned == pytest.approx((100 * 50 / 75 + 100 * 75 / 50) / 2)
    assert mean.uniform == pytest.approx((0 + 100) / 2)
    assert scores["a"].relative_pruned == pytest.approx(66.667, abs=1e-3)
    low, high = scores["a"].ci95 or (0, 0)
    assert -100 < low < -25.0 <= high < -low  # one of four answers lost, none won
    same, _ = compare(full, full, full)
    for item in same.values():  # equal in four answers says little about others
        assert item.ci95 == item.uniform_ci95
        low, high = item.ci95 or (0, 0)
        assert low < 0 < high


def test_compare_survives_a_full_model_without_a_right_answer() -> None:
    scores, mean = compare(suite_scores(a=[0, 0], b=[1, 1]), suite_scores(a=[1, 0], b=[1, 0]))
    assert (scores["a"].relative_pruned, mean.pruned, mean.uniform) == (None, None, None)
    with pytest.raises(DopError, match="same benchmarks"):
        compare(suite_scores(a=[1]), suite_scores(b=[1]))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A stand-in for lmms-eval: right answers in proportion to the tokens kept. Remembers what was measured."""
    calls: list[str] = []

    def score_suite(loaded, suite, strategy, *, work_dir, on_progress, revisions) -> SuiteScores:
        assert revisions == {}  # rendered rows have no commits
        calls.append("full" if strategy is None else strategy.key())
        kept = 20 if strategy is None or strategy.num_visual_tokens is None else strategy.num_visual_tokens % 20
        on_progress(20, 20, "everything")
        return suite_scores(**{item.name: [1.0] * kept + [0.0] * (20 - kept) for item in suite.benchmarks})

    monkeypatch.setattr("dop_search.evaluation.suite_scores.score_suite", score_suite)
    return calls


def test_all_states_are_scored_on_one_commit_of_the_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commits, given = iter(("first", "second")), []

    def score_suite(*args: object, revisions: dict[str, str], **kwargs: object) -> SuiteScores:
        given.append(revisions)
        return suite_scores(gqa=[1.0])

    monkeypatch.setattr("dop_search.evaluation.suite_scores.score_suite", score_suite)
    monkeypatch.setattr("dop_search.evaluation.lmms.hub.check_suite", lambda suite: None)
    monkeypatch.setattr("dop_search.evaluation.lmms.hub.revisions_of", lambda suite: {"lmms-lab/GQA": next(commits)})
    judge = SuiteJudge(SimpleNamespace(), load_suite("dop13"), tmp_path, Progress())
    judge.scores(None)
    judge.scores(Strategy.full(4, num_visual_tokens=3))
    assert given == [{"lmms-lab/GQA": "first"}] * 2


def test_every_state_of_the_model_is_measured_once(measured: list[str], tmp_path: Path) -> None:
    record = example_record()
    judge = SuiteJudge(SimpleNamespace(), load_suite("pocket13"), tmp_path, Progress())
    twice = [*record.results, *record.results]
    judged = judge.judge(twice, seed=0)
    states = {result.strategy.key() for result in twice} | {result.uniform_strategy.key() for result in twice}
    assert sorted(measured) == sorted(["full", *states])
    for result in judged:
        assert list(result.scores) == [item.name for item in load_suite("pocket13").benchmarks]
        assert result.scores["gqa"].full == 100.0
        assert result.scores["gqa"].uniform == pytest.approx(5.0 * (result.uniform.num_visual_tokens % 20))
    assert judge.info().suite == "pocket13"


def test_uniform_reduction_can_be_had_from_a_result_alone() -> None:
    result = example_record().results[1]
    uniform = result.uniform_strategy
    assert uniform.num_visual_tokens == result.uniform.num_visual_tokens
    expected = Strategy.full(12, num_visual_tokens=uniform.num_visual_tokens, selector=result.strategy.selector)
    assert uniform.key() == expected.key()
    assert result.model_copy(update={"uniform": None}).uniform_strategy is None


def test_a_suite_with_overrides_by_name_and_by_benchmarks() -> None:
    def given(**fields: object) -> Suite:
        return SearchConfig.model_validate({"eval": fields}).eval

    assert given(name="accuracy").benchmarks == given(name="none").benchmarks == ()
    assert given(name="pocket13") == load_suite("pocket13")
    by_name = given(name="pocket13", limit=4)
    assert by_name == load_suite("pocket13", limit=4)
    assert (by_name.limit, by_name.source, len(by_name.benchmarks)) == (4, "rendered", 13)
    few = given(name="pocket13", source="rendered", benchmarks=["gqa", "mme"], limit=2)
    assert [item.name for item in few.benchmarks] == ["gqa", "mme"]
    with pytest.raises(ValueError, match=r"'poket13'.*did you mean 'pocket13'"):
        given(name="poket13")
    with pytest.raises(ValueError, match="runs no benchmarks"):
        given(name="none", benchmarks=["gqa"])


def test_a_suite_in_a_configuration_is_written_as_it_was_given() -> None:
    own = {**asdict(load_suite("pocket13").benchmarks[0]), "name": "mine"}
    for benchmarks in (["gqa", "mme"], ["gqa", own]):
        config = SearchConfig.model_validate({"eval": {"name": "few", "source": "rendered", "benchmarks": benchmarks}})
        written = json.loads(config.model_dump_json())
        assert written["eval"]["benchmarks"][0] == "gqa"
        assert SearchConfig.model_validate(written) == config


def test_a_search_on_what_the_suite_scores_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    source = {"kind": "task", "task": "vqav2_val", "split": "validation", "dataset_path": "lmms-lab/VQAv2"}
    config = SearchConfig.model_validate(
        {
            "data": {"name": "mine", "sources": [source]},
            "eval": {"name": "dop13"},
            "model": {"name_or_path": "/nowhere"},
            "cache_dir": str(tmp_path),
        }
    )
    with pytest.raises(DataError, match=r"'vqav2_val' \(lmms-lab/VQAv2, split 'validation'\).*'vqav2' scores"):
        run(config, tmp_path / "out", Progress())
    assert list(tmp_path.iterdir()) == []
    for name in ("gqa", "textvqa", "scienceqa", "chartqa", "mixed"):
        data = SearchConfig.model_validate({"data": {"name": name}}).data
        for suite in ("dop13", "gsop6", "captions"):
            refuse_scored_data(data, load_suite(suite))


def test_records_from_before_there_were_scores_still_load() -> None:
    record = Record.load(ROOT / "experiments" / "main")
    assert record.scores is None
    assert all(result.scores == {} and result.relative_mean is None for result in record.results)
    old = example_record().model_dump(mode="json")
    del old["data"]["sources"], old["data"]["samples_file"]
    for result in old["results"]:
        del result["scores"], result["relative_mean"]
    assert Record.model_validate(old) == example_record()


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Record]:
    """A search with real benchmarks: two of them, a handful of rows."""
    path = tmp_path_factory.mktemp("scored")
    config = SearchConfig.model_validate(
        {
            "data": {"num_samples": 6, "num_heldout": 6, "num_test": 0},
            "space": {"name": "dop", "num_depth_levels": 2, "num_token_levels": 2},
            "search": {"solver": "additive_exact", "num_rerank": 2},
            "budget": [0.3],
            "eval": {"name": "pocket13", "source": "rendered", "benchmarks": ["gqa", "mme"], "limit": 4},
            "tracking": {"backend": "none"},
            "cache_dir": str(path / "cache"),
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", save_nothing)
        return path, run(config, path / "out", Progress())


def test_a_search_ends_with_real_scores(searched: tuple[Path, Record]) -> None:
    path, record = searched
    data = json.loads((path / "out" / RECORD_FILE).read_text())["results"][0]
    assert set(data["scores"]) == {"gqa", "mme"}
    for item in data["scores"].values():
        assert {"full", "pruned", "uniform", "ci95"} <= set(item)
        assert item["ci95"][0] <= item["pruned"] - item["full"] <= item["ci95"][1]
    assert record.scores.suite == "pocket13"
    assert record.results[0].scores["gqa"].num_samples == 4
    relative = [item.relative_pruned for item in record.results[0].scores.values()]
    if None not in relative:
        assert data["relative_mean"]["pruned"] == pytest.approx(np.mean(relative))
    assert "What is left on the benchmarks" in (path / "out" / "report.html").read_text()


def test_the_sample_ids_lie_beside_the_record(searched: tuple[Path, Record]) -> None:
    path, record = searched
    saved = json.loads((path / "out" / SAMPLES_FILE).read_text())
    assert record.data.samples_file == SAMPLES_FILE
    for split in ("search", "heldout"):
        assert saved[split]["fingerprint"] == record.data.fingerprints[split]
        assert len(saved[split]["ids"]) == 6
        assert saved[split]["ids"][0].startswith(f"pocket/{split}/")


def test_dop_eval_finds_the_scores_of_the_search_again(
    searched: tuple[Path, Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same model, strategy, benchmarks and cache: nothing is measured, and the numbers are the same."""
    from dop_search.app.config import EvalRunConfig
    from dop_search.app.evaluate import evaluate
    from dop_search.app.record import EvalRecord

    path, record = searched

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("a benchmark was run again")

    monkeypatch.setattr("dop_search.evaluation.suite_scores._Run._measure", forbidden)
    config = EvalRunConfig.model_validate(
        {
            "eval": {"name": "pocket13", "source": "rendered", "benchmarks": ["gqa", "mme"], "limit": 4},
            "strategy": str(path / "out" / "strategy-0.3.json"),
            "tracking": {"backend": "none"},
            "cache_dir": str(path / "cache"),
        }
    )
    found = evaluate(config, path / "again", Progress())
    assert EvalRecord.load(path / "again") == found
    (item,) = found.strategies
    assert (item.name, item.flops_ratio) == ("strategy-0.3", pytest.approx(record.results[0].flops_ratio))
    for name, score in record.results[0].scores.items():
        ours = item.scores[name]
        assert (ours.full, ours.pruned, ours.ci95) == (score.full, score.pruned, score.ci95)
    import pandas as pd

    for state in ("full", "strategy-0.3"):
        answers = pd.read_parquet(path / "again" / "samples" / state / "gqa.parquet")
        assert len(answers) == 4
        assert {"doc_id", "prediction", "targets", "value"} <= set(answers.columns)
