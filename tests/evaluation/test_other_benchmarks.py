"""Benchmarks without rendered rows: their values and aggregates on rows made up here, by lmms-eval's own code."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import yaml
from fixed_answers import FixedAnswers
from PIL import Image

from dop_search.evaluation.lmms.quiet import silenced
from dop_search.evaluation.lmms.run import run_benchmark
from dop_search.evaluation.lmms.tasks import task_manager, write_tasks
from dop_search.evaluation.suites import catalogue, make_suite

GREY = Image.new("RGB", (8, 8), "grey")


def _caption(index, texts):
    return {"image": GREY, "image_id": index, "annotations_captions": list(texts)}


ROWS = {
    "ok_vqa": [
        {
            "image": GREY,
            "question": "what?",
            "question_id": str(i),
            "answers": ["red"] * 2 + ["blue"] * 8,
            "answer": "blue",
        }
        for i in range(3)
    ],
    "mmmu": [
        {
            "id": f"validation_{subject}_{i}",
            "question": "Which? <image 1>",
            "options": "['red', 'blue']",
            "question_type": "multiple-choice",
            "answer": "A",
            "image_1": GREY,
            **{f"image_{n}": None for n in range(2, 8)},
        }
        for i, subject in enumerate(("Art", "Art", "Music"))
    ],
    "mlvu": [
        {"video_name": "v.mp4", "question": "q", "answer": "A", "task_type": kind}
        for kind in ("count", "count", "count", "ego", "order", "needle", "plotQA", "anomaly_reco", "topic_reasoning")
    ],
    "nocaps": [
        _caption(0, ["a red ring above a blue star", "the red ring is over a star"]),
        _caption(1, ["two green moons", "a pair of green moons in the dark"]),
        _caption(2, ["a large yellow circle", "one big circle"]),
    ],
}


def _run(benchmark, answer, tmp_path, monkeypatch):
    """Score fixed answers on ``ROWS``, read in place of the hub's data set."""
    import datasets

    suite = make_suite("local", [benchmark], judge=False)
    folder = write_tasks(suite, tmp_path / "tasks", tmp_path)
    split = suite.benchmarks[0].dataset.split
    datasets.Dataset.from_list(ROWS[benchmark]).to_parquet(tmp_path / "rows.parquet")
    path = folder / f"{benchmark}.yaml"
    text = path.read_text() + yaml.safe_dump({"dataset_path": "parquet", "dataset_name": None})
    files = {"data_files": {split: str(tmp_path / "rows.parquet")}, "cache_dir": str(tmp_path / "arrow")}
    text = "\n".join(line for line in text.splitlines() if not line.startswith("dataset_kwargs"))
    path.write_text(text + "\n" + yaml.safe_dump({"dataset_kwargs": files}))
    with silenced(tmp_path / "log"):
        model = FixedAnswers(answer)
        monkeypatch.setattr(FixedAnswers, "generate_until", lambda self, rs: [answer(None, r.args[3]) for r in rs])
        return run_benchmark(model, suite, suite.benchmarks[0], task_manager(folder))


def test_ok_vqa_by_consensus(tmp_path, monkeypatch):
    """Red has 2 of 10 votes: 2 × 1/3 and 8 × 2/3 over 10 left-out annotators; blue has 8: all 1."""
    score = _run("ok_vqa", lambda row, index: ("red", "blue", "green")[index], tmp_path, monkeypatch)
    assert [sample.value for sample in score.samples] == pytest.approx([0.6, 1.0, 0.0])


def test_mmmu_counts_letters(tmp_path, monkeypatch):
    score = _run("mmmu", lambda row, index: "AAB"[index], tmp_path, monkeypatch)
    assert [sample.value for sample in score.samples] == [1.0, 1.0, 0.0]
    assert score.score == pytest.approx(200 / 3)


def test_mlvu_weighs_its_task_types_alike(tmp_path, monkeypatch):
    """Two of three "count" questions wrong, everything else right: (1/3 + 6) / 7."""
    score = _run("mlvu", lambda row, index: "B" if index < 2 else "A", tmp_path, monkeypatch)
    assert score.score == pytest.approx(100 * (1 / 3 + 6) / 7)


@pytest.mark.skipif(shutil.which("java") is None, reason="the tokenizer of CIDEr is a Java program")
@pytest.mark.slow
def test_captions_have_a_cider_per_image(tmp_path, monkeypatch):
    """The mean over images equals lmms-eval's corpus score (checked while running); a copied caption is worth most."""
    said = ["a red ring above a blue star", "something else", "one big circle"]
    score = _run("nocaps", lambda row, index: said[index], tmp_path, monkeypatch)
    first, second, third = (sample.value for sample in score.samples)
    assert first > 1
    assert third > 1
    assert second < 0.5


def test_every_benchmark_is_rendered_or_tested_here_or_alike():
    from dop_search.data.benchmarks import RENDERED_BENCHMARKS

    alike = {"textcaps": "nocaps", "videomme": "mlvu"}
    assert set(catalogue()) == {*RENDERED_BENCHMARKS, *ROWS, *alike}
    assert dataclasses.asdict(make_suite("s", ["textcaps"]).benchmarks[0])["needs"] == ("java",)
