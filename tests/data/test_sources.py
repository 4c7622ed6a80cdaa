"""Samples of benchmarks and data sets: real lmms-eval task code on local rows, disjoint splits, no scored split."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from huggingface_hub.errors import HTTPError
from PIL import Image

from dop_search.data.disjoint import shares, split_of
from dop_search.data.pools import check_sources, location_of, open_pool, refuse_overlap
from dop_search.data.samples import Sample
from dop_search.data.sources import (
    DatasetSource,
    ImageTable,
    Location,
    Origin,
    TaskSource,
    known_names,
    named_sources,
    parse_source,
)
from dop_search.data.tables import load_table
from dop_search.data.tasks import scored_origin, task_file
from dop_search.data.validation import SPLITS, validation_set
from dop_search.utils.errors import DataError

SHORT = "\nAnswer the question using a single word or phrase."


def picture(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 10, 3), dtype=np.uint8))


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(rows)
    if rows and "image" in rows[0]:
        table = table.cast_column("image", datasets.Image())
    table.to_parquet(str(path))
    return path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))


@pytest.fixture
def gqa(tmp_path: Path) -> Path:
    """A folder laid out as GQA is on the hub: questions and images in configurations of their own."""
    folder = tmp_path / "GQA"
    rows = [
        {"id": f"q{i}", "imageId": f"n{i % 60}", "question": f"Is it {i}?", "answer": "yes" if i % 2 else "no"}
        for i in range(120)
    ]
    write(folder / "questions" / "val-0.parquet", rows)
    write(folder / "images" / "val-0.parquet", [{"id": f"n{i}", "image": picture(i)} for i in reversed(range(60))])
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: val_balanced_instructions\n  data_files: [{split: val, path: questions/val-*}]\n"
        "- config_name: val_balanced_images\n  data_files: [{split: val, path: images/val-*}]\n---\n"
    )
    return folder


def gqa_source(folder: Path) -> TaskSource:
    return TaskSource(
        task="gqa",
        dataset_path=str(folder),
        dataset_name="val_balanced_instructions",
        split="val",
        images=ImageTable("val_balanced_images", "val"),
    )


def test_gqa_asks_with_the_tasks_prompt_and_finds_its_images(gqa: Path) -> None:
    pool = open_pool(gqa_source(gqa))
    assert len(pool) == 120
    sample = pool.sample(97)
    assert sample.id == "gqa/val/97"
    assert sample.question == "Is it 97?" + SHORT  # what lmms-eval 0.7.3 asks on GQA
    assert sample.answers == ("yes",)
    assert sample.image.tobytes() == picture(37).tobytes()


def test_splits_share_no_image_whatever_seed_and_size(gqa: Path) -> None:
    parts = {split: validation_set("mine", 8, 0, split, sources=[gqa_source(gqa)]) for split in SPLITS}
    images = {split: {sample.image.tobytes() for sample in part} for split, part in parts.items()}
    other = validation_set("mine", 12, 5, "heldout", sources=[gqa_source(gqa)])
    assert not images["search"] & images["heldout"]
    assert not images["search"] & images["test"]
    assert not images["heldout"] & images["test"]
    assert not images["search"] & {sample.image.tobytes() for sample in other}
    again = validation_set("mine", 8, 0, "search", sources=[gqa_source(gqa)])
    assert again.fingerprint == parts["search"].fingerprint
    longer = validation_set("mine", 12, 0, "search", sources=[gqa_source(gqa)])
    assert longer.ids[:8] == parts["search"].ids


def test_a_pool_that_is_too_small_says_how_many_there_are(gqa: Path) -> None:
    mine = sum(split_of(Sample("", picture(i), "", (), "").content, 3) == 0 for i in range(60))
    with pytest.raises(
        DataError, match=rf"'gqa' has 120 samples, of which {2 * mine} are for this split.*119 are asked"
    ):
        validation_set("mine", 119, sources=[gqa_source(gqa)])


def test_vqa_tasks_accept_every_answer_and_the_most_frequent_first(tmp_path: Path) -> None:
    answers = ["stop", "STOP sign", "stop", "a stop", "stop", "STOP sign"]
    rows = [{"image": picture(0), "question": "what is written?", "question_id": 1, "answers": answers}]
    write(tmp_path / "textvqa" / "data" / "train-00000-of-00001.parquet", rows)
    source = TaskSource("textvqa_val", "train", dataset_path=str(tmp_path / "textvqa"))
    sample = open_pool(source).sample(0)
    assert sample.answers == ("stop", "STOP sign", "a stop")
    assert sample.question == "What is written?" + SHORT
    assert open_pool(TaskSource("textvqa_val", "train", dataset_path=source.dataset_path, target="answers")).sample(0)


def test_options_become_the_tasks_own_letters(tmp_path: Path) -> None:
    row = {"image": picture(0), "question": "Which?", "choices": ["a cat", "a dog"], "answer": 1, "hint": "Look."}
    write(tmp_path / "ScienceQA" / "data" / "validation-0.parquet", [row])
    sample = open_pool(
        TaskSource("scienceqa_img", "validation", dataset_path=str(tmp_path / "ScienceQA"), dataset_name="default")
    ).sample(0)
    assert sample.answers == ("B",)
    options = "A. a cat\nB. a dog\nAnswer with the option's letter from the given choices directly."
    assert sample.question == f"Context: Look.\nWhich?\n{options}"


def test_a_task_file_of_ones_own(tmp_path: Path) -> None:
    for split, first in (("train", 0), ("test", 10)):
        rows = [
            {"image": picture(first + i), "question": f"{i}?", "question_id": str(i), "answer": "yes", "category": "x"}
            for i in range(4)
        ]
        write(tmp_path / f"{split}.parquet", rows)
    pope = task_file("pope")
    task = tmp_path / "my_pope.yaml"
    task.write_text(
        f"include: {pope}\ntask: my_pope\ndataset_path: parquet\n"
        "dataset_kwargs: {data_files: {train: train.parquet, test: test.parquet}}\n"
    )
    pool = open_pool(TaskSource(str(task), "train"))
    assert (pool.label, len(pool)) == ("my_pope", 4)
    assert pool.sample(2).image.tobytes() == picture(2).tobytes()
    with pytest.raises(DataError, match=r"'my_pope' \(parquet, split 'test'\) is what the benchmark 'my_pope' scores"):
        open_pool(TaskSource(str(task), "test"))
    scored = {"my_pope": scored_origin(str(task))}
    copy = DatasetSource(str(tmp_path / "test.parquet"), "anything")
    with pytest.raises(DataError, match="must not be searched on the samples that judge it"):
        refuse_overlap([copy], scored)
    refuse_overlap([DatasetSource(str(tmp_path / "train.parquet"), "test")], scored)


@pytest.mark.parametrize("split", ["test", "test[:500]", "train[10%:]+TEST", "all"])
def test_a_part_of_a_scored_split_is_scored_data(split: str) -> None:
    scored = {"pope": Origin.of(Location("lmms-lab/POPE"), "test")}
    with pytest.raises(DataError, match="must not be searched on the samples that judge it"):
        refuse_overlap([DatasetSource("lmms-lab/POPE", split)], scored)
    refuse_overlap([DatasetSource("lmms-lab/POPE", "train[:500]+validation")], scored)


def test_ids_that_tell_no_samples_apart_are_refused(tmp_path: Path) -> None:
    write(
        tmp_path / "some.parquet",
        [{"image": picture(i), "question": "?", "answer": "a", "page": i // 2} for i in range(4)],
    )
    with pytest.raises(DataError, match=r"the column 'page' of .* has 0 2 times"):
        open_pool(DatasetSource(str(tmp_path / "some.parquet"), "train", id="page"))


def test_a_data_set_by_columns(tmp_path: Path) -> None:
    rows = [{"picture": picture(i), "query": f"how many {i}", "label": [str(i)], "kind": "c", "n": i} for i in range(9)]
    table = datasets.Dataset.from_list(rows).cast_column("picture", datasets.Image())
    table.to_parquet(str(tmp_path / "charts.parquet"))
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "saved"))
    columns = {"image": "picture", "question": "query", "answer": "label", "family": "kind", "id": "n"}
    for path in (tmp_path / "charts.parquet", tmp_path / "saved"):
        source = DatasetSource(str(path), "train", prompt="{kind}: {question}?", **columns)
        sample = open_pool(source).sample(4)
        assert (sample.question, sample.answers, sample.family) == ("c: how many 4?", ("4",), "c")
        assert sample.id == f"{path.stem}/train/4"
        assert sample.image.tobytes() == picture(4).tobytes()
    with pytest.raises(DataError, match=r"no columns for \{'answer': 'answer'\}; it has \['picture', 'query'"):
        open_pool(DatasetSource(str(tmp_path / "charts.parquet"), "train", **{**columns, "answer": "answer"}))
    with pytest.raises(DataError, match=r"prompt '\{quest\}' cannot be filled"):
        open_pool(DatasetSource(str(tmp_path / "charts.parquet"), "train", prompt="{quest}", **columns)).sample(0)
    with pytest.raises(DataError, match=r"has no split 'val'; it has \['train'\]"):
        open_pool(DatasetSource(str(tmp_path / "saved"), "val", **columns))
    with pytest.raises(DataError, match="families"):
        validation_set("mine", 2, families=["d"], sources=[DatasetSource(str(path), "train", **columns)])


def test_a_mixture_takes_its_weights_in_turn(gqa: Path, tmp_path: Path) -> None:
    rows = [{"image": picture(100 + i), "question": f"{i}?", "answer": str(i)} for i in range(30)]
    write(tmp_path / "other.parquet", rows)
    sources = [gqa_source(gqa), DatasetSource(str(tmp_path / "other.parquet"), "train", weight=0.5)]
    data = validation_set("mine", 9, sources=sources)
    families = [sample.family for sample in data]
    assert (families.count("gqa"), families.count("other")) == (6, 3)
    assert families[:4] == ["gqa", "other", "gqa", "other"]
    with pytest.raises(DataError, match="a name of its own"):
        validation_set("mine", 4, sources=[sources[0], sources[0]])


@pytest.mark.parametrize("total", [1, 7, 100])
@pytest.mark.parametrize("weights", [[1.0], [1, 1, 1], [0.2, 3.0, 1.0]])
def test_shares_sum_up_and_stay_within_one_of_the_exact_ones(weights: list[float], total: int) -> None:
    sizes = shares(weights, total)
    assert sum(sizes) == total
    assert all(abs(size - total * weight / sum(weights)) < 1 for size, weight in zip(sizes, weights, strict=True))


def test_every_named_data_set_avoids_what_its_benchmark_scores() -> None:
    """The files in conf/data against lmms-eval's own task files; neither data nor task code is needed."""
    names = known_names()
    assert {"gqa", "textvqa", "scienceqa", "chartqa", "mixed"} <= set(names)
    scored = {task: scored_origin(task) for task in ("gqa", "textvqa_val", "scienceqa_img", "chartqa", "vqav2_val")}
    assert (scored["gqa"].dataset, scored["gqa"].splits) == ("gqa", {"testdev"})
    assert (scored["textvqa_val"].dataset, scored["textvqa_val"].splits) == ("textvqa", {"validation"})
    for name in names:
        refuse_overlap(named_sources(name) or (), scored)
    mirror = TaskSource("gqa", "testdev", dataset_path="lmms-lab/GQA", dataset_name="testdev_all_instructions")
    with pytest.raises(DataError, match=r"lmms-lab/GQA.*testdev.*'gqa' scores"):
        refuse_overlap([mirror], scored)
    read = Origin.of(location_of(mirror), "testdev")
    assert not read.overlaps(Origin.of(Location("lmms-lab/GQA"), "val"))


def test_without_network_the_remedy_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gqa", "chartqa"):
        with pytest.raises(DataError) as caught:
            validation_set(name, 5)
        for text in ("HF_HOME", "HF_HUB_CACHE", "data=pocket", "cannot be reached"):
            assert text in str(caught.value)
        assert str(caught.value).startswith("the data set '")
    with pytest.raises(DataError, match="HF_HOME"):
        check_sources(named_sources("mixed") or ())
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("dop_search.data.tables.hub_is_reachable", lambda: False)
    with pytest.raises(DataError, match="HF_HOME"):
        validation_set("chartqa", 5)


def test_an_error_of_the_hubs_http_client_is_one_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever client the hub's library uses; it changed from httpx to httpx2."""

    def fail(*_: object, **__: object) -> None:
        raise HTTPError("the server closed the connection")

    monkeypatch.setattr("dop_search.data.tables.check_reachable", lambda *_: None)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"cannot load the data set 'owner/name'.*the server closed the connection"):
        load_table(Location("owner/name"), "train")


def test_what_is_wrong_with_a_source_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no task 'gqaa'; did you mean 'gqa'"):
        open_pool(TaskSource("gqaa", "val"))
    with pytest.raises(DataError, match="no task file"):
        open_pool(TaskSource(str(tmp_path / "no.yaml"), "val"))
    with pytest.raises(DataError, match="kind: task"):
        parse_source({"task": "gqa"}, "here")
    with pytest.raises(DataError, match=r"here: .*unexpected keyword argument 'splitt'"):
        parse_source({"kind": "task", "task": "gqa", "splitt": "val"}, "here")
    with pytest.raises(DataError, match="weight > 0"):
        DatasetSource("x", "train", weight=0)
    with pytest.raises(DataError, match=r"cannot load .*parquet"):
        open_pool(DatasetSource(str(tmp_path / "no.parquet"), "train"))
    rows = [{"image": None, "question": "?", "answer": "x"}, {"image": b"no", "question": "?", "answer": ""}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "bad.parquet"))
    pool = open_pool(DatasetSource(str(tmp_path / "bad.parquet"), "train"))
    with pytest.raises(DataError, match="bad/train/0: an image is needed"):
        pool.sample(0)
    with pytest.raises(DataError, match="bad/train/1: cannot read the image"):
        pool.sample(1)


def test_reading_sources_imports_neither_lmms_eval_nor_datasets() -> None:
    code = (
        "import sys, dop_search.app.config; from dop_search.data.sources import named_sources;"
        "from dop_search.data.pools import location_of; from dop_search.data.tasks import scored_origin;"
        "[location_of(s) for s in named_sources('mixed')]; scored_origin('mme');"
        "sys.exit(str([m for m in ('lmms_eval', 'datasets', 'torch') if m in sys.modules] or ''))"
    )
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert result.stderr.strip() == ""
