"""The 13 benchmarks by lmms-eval's own code: scores of fixed answers, made by hand, and the prompts."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from pathlib import Path

import pytest
import yaml
from fixed_answers import FixedAnswers, right_answer, wrong_answer

from dop_search.data.benchmarks import RENDERED_BENCHMARKS, benchmark_rows
from dop_search.data.rendered.formats import Question, prompt
from dop_search.data.tasks import task_fields, tasks_root
from dop_search.evaluation.lmms.hub import check_suite
from dop_search.evaluation.lmms.quiet import silenced
from dop_search.evaluation.lmms.tasks import scored_rows, task_manager, write_tasks
from dop_search.evaluation.suites import catalogue, load_suite, make_suite, suite_names
from dop_search.utils.errors import ConfigError, DataError, DopError

SUITE = load_suite("pocket13")
BY_NAME = {benchmark.name: benchmark for benchmark in SUITE.benchmarks}


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pocket13")
    with silenced(folder / "log"):
        return task_manager(write_tasks(SUITE, folder / "tasks", folder / "data"))


@pytest.fixture
def run(manager, tmp_path, monkeypatch):
    """Score fixed answers; nothing may be written into the working directory."""
    from dop_search.evaluation.lmms.run import run_benchmark

    monkeypatch.chdir(tmp_path)

    def call(benchmark, answer, suite=SUITE):
        model = FixedAnswers(answer)
        with silenced(tmp_path / "log"):
            score = run_benchmark(model, suite, BY_NAME[benchmark], manager)
        assert [path.name for path in tmp_path.iterdir()] == ["log"]
        return score, model

    return call


def _three_of_four(benchmark):
    """Right, except for every fourth row."""
    return lambda row, index: (wrong_answer if index % 4 == 0 else right_answer)(benchmark, row)


def _f1(rows):
    said = [row["answer"] if i % 4 else {"yes": "no", "no": "yes"}[row["answer"]] for i, row in enumerate(rows)]
    hits = sum(s == r["answer"] == "yes" for s, r in zip(said, rows, strict=True))
    return 200 * hits / (said.count("yes") + sum(r["answer"] == "yes" for r in rows))


def _mme(rows):
    """Every second pair has one wrong answer."""
    pairs = defaultdict(list)
    for pair in range(len(rows) // 2):
        pairs[rows[2 * pair]["category"]].append(150.0 - 100.0 if pair % 2 == 0 else 200.0)
    return sum(sum(values) / len(values) for values in pairs.values())


EXPECTED = {
    **dict.fromkeys(RENDERED_BENCHMARKS, lambda rows: 75.0),
    "pope": _f1,
    "mme": _mme,
    "ocrbench": lambda rows: 750.0,
    "hallusionbench": lambda rows: (75.0 + 50.0 + 50.0) / 3,  # question 0 of figure 1 is wrong in every set
}


@pytest.mark.parametrize("benchmark", RENDERED_BENCHMARKS)
@pytest.mark.fast_cases(2)
def test_scores_of_fixed_answers_are_those_made_by_hand(run, benchmark):
    rows = benchmark_rows(benchmark)
    score, model = run(benchmark, _three_of_four(benchmark))
    assert score.score == pytest.approx(EXPECTED[benchmark](rows))
    assert score.num_samples == len(rows) >= 100
    assert [sample.doc_id for sample in score.samples] == list(range(len(rows)))
    assert set(model.num_media) == {1}
    perfect, _ = run(benchmark, lambda row, index: right_answer(benchmark, row))
    assert perfect.score == pytest.approx({"mme": 600.0, "ocrbench": 1000.0}.get(benchmark, 100.0))


FORMATS = {
    **{name: name for name in RENDERED_BENCHMARKS},
    "scienceqa": {"": "scienceqa", "The picture shows several things.": "scienceqa_context"},
    "mmbench_en": {"nan": "mmbench_en", "The picture shows several things.": "mmbench_en_hint"},
    "mmbench_cn": {"nan": "mmbench_cn", "请看图回答问题。": "mmbench_cn_hint"},
}
"""Format by the row's hint where there is more than one."""


@pytest.mark.parametrize("benchmark", RENDERED_BENCHMARKS)
@pytest.mark.fast_cases(3)
def test_prompts_are_those_that_the_bundled_model_was_trained_on(run, benchmark):
    """What the task's own code asks equals our format of the question, with one known exception: lmms-eval introduces
    the options of MMBench-CN in English."""
    rows = []
    _, model = run(benchmark, lambda row, index: rows.append(row) or "nothing", dataclasses.replace(SUITE, limit=24))
    seen = set()
    for row, text in zip(rows, model.prompts, strict=True):
        known = FORMATS[benchmark]
        known = known if isinstance(known, str) else known[row["hint"]]
        options = row.get("choices") or row.get("options") or [row[c] for c in "ABCD" if c in row]
        stem = row["question"].removesuffix(" Please answer yes or no.")
        expected = prompt(Question("any", stem, "A", tuple(options)), known)
        assert text == expected.replace("有如下几个选项：", "There are several options:")
        seen.add(known)
    assert len(seen) == 1 or len(seen) == len(FORMATS[benchmark])


@pytest.mark.parametrize("benchmark", RENDERED_BENCHMARKS)
def test_the_written_task_has_the_suites_longest_answer_and_else_lmms_evals_options(manager, benchmark):
    """What `lmms-eval --include_path` reads: the only option that the suite sets is changed."""
    written = manager.load_task_or_group([f"pocket13_{benchmark}"])[f"pocket13_{benchmark}"].config.generation_kwargs
    theirs = task_fields(tasks_root() / BY_NAME[benchmark].yaml)["generation_kwargs"]
    assert SUITE.max_new_tokens == 16
    assert written == {"until": ["\n\n"], **theirs, "max_new_tokens": 16}


def test_a_limit_keeps_pairs_and_sets_whole(run):
    score, _ = run("mme", _three_of_four("mme"), dataclasses.replace(SUITE, limit=9))
    ids = [sample.doc_id for sample in score.samples]
    assert len(ids) == 8
    assert [i for i in ids if i % 2 == 0] == [i - 1 for i in ids if i % 2]
    more, _ = run("mme", _three_of_four("mme"), dataclasses.replace(SUITE, limit=20))
    assert set(ids) < {sample.doc_id for sample in more.samples}
    sets, _ = run("hallusionbench", _three_of_four("hallusionbench"), dataclasses.replace(SUITE, limit=1))
    assert [sample.doc_id - sets.samples[0].doc_id for sample in sets.samples] == [0, 1, 2, 3]


def test_ocrbench_on_a_part_of_its_rows_keeps_its_scale(run):
    answer = lambda row, index: (wrong_answer if index < 3 else right_answer)("ocrbench", row)  # noqa: E731
    assert run("ocrbench", answer, dataclasses.replace(SUITE, limit=10))[0].score == pytest.approx(700.0)


def test_rotations_of_a_question_are_kept_together():
    mmbench = BY_NAME["mmbench_en"]
    docs = {"index": [0, 1, 2, 1_000_000, 1_000_001, 1_000_002]}

    class Docs(dict):
        def __len__(self):
            return 6

    first, second = scored_rows(mmbench, Docs(docs), 2)
    assert second == first + 3
    assert scored_rows(mmbench, Docs(docs), None) == list(range(6))


def test_a_sample_that_raises_fails_the_run(run):
    def answer(row, index):
        if index == 7:
            raise RuntimeError("sample 7 broke")
        return "yes"

    with pytest.raises(RuntimeError, match="sample 7 broke"):
        run("pope", answer)


def test_a_metric_that_disagrees_is_an_error(manager, tmp_path):
    from dop_search.evaluation.lmms.run import run_benchmark

    misread = dataclasses.replace(BY_NAME["gqa"], aggregate="mean_of_1000")
    with silenced(tmp_path / "log"), pytest.raises(DopError, match=r"GQA: lmms-eval gives .* does not fit the task"):
        run_benchmark(FixedAnswers(_three_of_four("gqa")), SUITE, misread, manager)


@pytest.mark.parametrize("name", catalogue())
def test_the_catalogue_says_what_lmms_eval_says(name):
    """Data set, config and split of every benchmark equal those in lmms-eval's own file."""
    benchmark = next(b for s in suite_names() for b in load_suite(s).benchmarks if b.name == name)
    path = tasks_root() / benchmark.yaml
    fields = {}
    while path is not None:
        text = "\n".join(line for line in path.read_text().splitlines() if "!function" not in line)
        loaded = yaml.safe_load(text)
        fields = {**loaded, **fields}
        path = path.parent / loaded["include"] if "include" in loaded else None
    assert fields["dataset_path"] == benchmark.dataset.path
    assert fields.get("dataset_name") == benchmark.dataset.name
    assert fields["test_split"] == benchmark.dataset.split
    given = {entry["metric"] for entry in fields["metric_list"]}
    assert {metric.split(",")[0] for metric in benchmark.metrics} <= given


def test_without_network_the_cache_variables_and_the_rendered_suite_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("dop_search.evaluation.lmms.hub.hub_is_reachable", lambda: False)
    with pytest.raises(DataError, match=r"(?s)lmms-lab-encoder/GQA.*HF_HOME=DIR \(or HF_HUB_CACHE.*eval=pocket13"):
        check_suite(load_suite("dop13_static"))


def test_a_judge_needs_its_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"MMBench.*HallusionBench.*OPENAI_API_KEY.*eval=dop13_static"):
        check_suite(load_suite("dop13"))


def test_suites_refuse_what_they_do_not_know():
    with pytest.raises(ConfigError, match=r"unknown suite 'pocket12'.*did you mean 'pocket13'"):
        load_suite("pocket12")
    with pytest.raises(ConfigError, match=r"unknown benchmark 'gqu'.*did you mean 'gqa'"):
        make_suite("s", ["gqu"])
    with pytest.raises(ConfigError, match=r"unknown key 'limt'.*did you mean 'limit'"):
        make_suite("s", ["gqa"], limt=3)
    with pytest.raises(ConfigError, match=r"`limit >= 1` must hold, but got \(limit=0\)"):
        make_suite("s", ["gqa"], limit=0)
    with pytest.raises(ConfigError, match="each once"):
        make_suite("s", ["gqa", "gqa"])
    with pytest.raises(ConfigError, match="has no rendered rows"):
        write_tasks(make_suite("s", ["mmmu"], source="rendered"), Path("x"), Path("y"))


def test_a_suite_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nbenchmarks: [pope, gqa]\nsource: rendered\njudge: false\n")
    assert [benchmark.name for benchmark in load_suite(path).benchmarks] == ["pope", "gqa"]


def test_the_13_are_those_of_the_paper_suites():
    assert load_suite("dop13").benchmarks == load_suite("dop13_static").benchmarks == SUITE.benchmarks
    assert len(SUITE.benchmarks) == 13
