"""Benchmarks from the hub, without one: commits, the image data set of GQA, and what generated tasks say."""

from __future__ import annotations

import yaml

from dop_search.data.benchmarks import benchmark_rows
from dop_search.evaluation.lmms import hub
from dop_search.evaluation.lmms.gqa import with_images
from dop_search.evaluation.lmms.tasks import write_tasks
from dop_search.evaluation.suites import load_suite, make_suite
from dop_search.utils.network import offline


def _cache(folder, path, commit):
    reference = folder / f"datasets--{path.replace('/', '--')}" / "refs" / "main"
    reference.parent.mkdir(parents=True)
    reference.write_text(commit)


def test_a_cached_data_set_is_used_at_its_cached_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "hub_is_reachable", lambda: False)
    suite = make_suite("mine", ["gqa", "pope"], judge=False)
    _cache(tmp_path, "lmms-lab-encoder/GQA", "a" * 40)
    _cache(tmp_path, "lmms-lab-encoder/POPE", "b" * 40)
    hub.check_suite(suite)
    assert hub.revisions_of(suite) == {"lmms-lab-encoder/GQA": "a" * 40, "lmms-lab-encoder/POPE": "b" * 40}


def test_rendered_suites_ask_for_nothing(monkeypatch):
    def fail():
        raise AssertionError("asked the network")

    monkeypatch.setattr(hub, "hub_is_reachable", fail)
    hub.check_suite(load_suite("pocket13"))
    assert hub.revisions_of(load_suite("pocket13")) == {}


def test_offline_is_undone():
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    with offline(True):
        assert (datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE) == (True, True)
    assert before == (datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE)


def _fields(path):
    lines = [line for line in path.read_text().splitlines() if "!function" not in line]
    return yaml.safe_load("\n".join(lines))


def test_generated_tasks_pin_the_commit_and_need_no_login(tmp_path):
    suite = make_suite("mine", ["gqa", "pope", "videomme"], judge=False)
    folder = write_tasks(suite, tmp_path, tmp_path, {"lmms-lab-encoder/GQA": "a1", "lmms-lab-encoder/POPE": "b2"})
    assert _fields(folder / "pope.yaml")["dataset_kwargs"] == {"revision": "b2"}
    assert _fields(folder / "gqa.yaml")["dataset_kwargs"] == {"revision": "a1"}
    assert "revision='a1'" in (folder / "gqa_images.py").read_text()
    assert "dataset_kwargs" not in _fields(folder / "videomme.yaml")


def test_a_suite_without_judge_uses_the_code_that_asks_none(tmp_path):
    names = ["mmbench_en", "mmbench_cn", "hallusionbench"]
    without = write_tasks(make_suite("without", names, judge=False), tmp_path, tmp_path)
    for name in names:
        assert "static" in (without / f"{name}.yaml").read_text() or "_intern" in (without / f"{name}.yaml").read_text()
    judged = write_tasks(make_suite("judged", names, judge=True), tmp_path, tmp_path)
    assert _fields(judged / "mmbench_en.yaml")["metric_list"] == []
    assert "metric_list" not in _fields(judged / "hallusionbench.yaml")


def test_gqa_questions_get_their_images(monkeypatch):
    import datasets

    rows = benchmark_rows("gqa", 4)
    images = datasets.Dataset.from_dict(
        {"id": [f"n{i}" for i in range(4)], "image": [row["image"] for row in rows]},
        features=datasets.Features({"id": datasets.Value("string"), "image": datasets.Image()}),
    )
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or images)
    questions = datasets.Dataset.from_dict({"imageId": ["n2", "n0", "n2"], "question": ["a", "b", "c"]})
    joined = with_images(questions, revision="a1")
    assert [row["image"].tobytes() for row in joined] == [rows[i]["image"].tobytes() for i in (2, 0, 2)]
    assert joined["question"][:] == ["a", "b", "c"]
    assert asked == [(("lmms-lab-encoder/GQA", "testdev_balanced_images"), {"split": "testdev", "revision": "a1"})]
