"""Rendered rows in the benchmarks' schemas: reproducible, apart from what a search sees, and not to be guessed."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import pytest

from dop_search.data.benchmarks import RENDERED_BENCHMARKS, benchmark_file, benchmark_rows
from dop_search.data.benchmarks.rows import Row
from dop_search.data.rendered import rendered_samples
from dop_search.utils.errors import DataError

DIGESTS = {"gqa": "bcd93eaf23baa1d4", "mme": "cfbee683ec321330", "hallusionbench": "10243d4bbbe2518c"}


@pytest.fixture(scope="module")
def rows():
    return {benchmark: benchmark_rows(benchmark) for benchmark in RENDERED_BENCHMARKS}


def rows_fingerprint(rows: list[Row]) -> str:
    """16 hex digits over all values and pixels."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps({k: v for k, v in row.items() if k != "image"}, sort_keys=True).encode())
        digest.update(row["image"].tobytes())
    return digest.hexdigest()[:16]


@pytest.mark.slow
def test_rows_are_the_same_on_every_machine(rows):
    """The digests were taken once; others mean that VERSION in rows.py must be raised."""
    digests = {name: rows_fingerprint(rows[name]) for name in ("gqa", "mme", "hallusionbench")}
    assert digests == DIGESTS


def test_a_longer_request_starts_with_the_shorter_one(rows):
    for benchmark in ("chartqa", "mme"):
        assert rows_fingerprint(benchmark_rows(benchmark, 12)) == rows_fingerprint(rows[benchmark][:12])


def test_no_image_is_seen_in_a_search_or_in_another_benchmark(rows):
    images = {name: {row["image"].tobytes() for row in rows[name]} for name in rows}
    searched = {sample.image.tobytes() for sample in rendered_samples("search", 200, seed=0)}
    everything = Counter(image for found in images.values() for image in found)
    assert max(everything.values()) == 1
    assert not searched & set(everything)


@pytest.mark.parametrize("benchmark", RENDERED_BENCHMARKS)
def test_no_constant_answer_pays(rows, benchmark):
    def answer(row):
        return row.get("gt_answer", row.get("answer"))

    answers = Counter(str(answer(row)) for row in rows[benchmark])
    assert len(rows[benchmark]) >= 100
    assert max(answers.values()) <= 0.6 * len(rows[benchmark])


def test_mme_comes_in_pairs_of_yes_and_no(rows):
    for first, second in zip(rows["mme"][::2], rows["mme"][1::2], strict=True):
        assert first["question_id"] == second["question_id"]
        assert {first["answer"], second["answer"]} == {"Yes", "No"}
        assert first["image"].tobytes() == second["image"].tobytes()


def test_hallusionbench_sets_contradict_themselves(rows):
    for start in range(0, len(rows["hallusionbench"]), 4):
        group = rows["hallusionbench"][start : start + 4]
        assert len({row["set_id"] for row in group}) == 1
        assert {(row["figure_id"], row["question_id"]) for row in group} == {(f, q) for f in "12" for q in "01"}
        truth = {(row["figure_id"], row["question_id"]): row["gt_answer"] for row in group}
        assert sorted(truth.values()) == ["0", "0", "1", "1"]
        assert truth["1", "0"] != truth["2", "0"]


def test_parquet_files_give_back_the_rows(rows, tmp_path):
    datasets = pytest.importorskip("datasets")
    path = benchmark_file("mmbench_cn", tmp_path)
    stamp = path.stat().st_mtime_ns
    assert benchmark_file("mmbench_cn", tmp_path).stat().st_mtime_ns == stamp
    read = datasets.load_dataset("parquet", data_files={"dev": str(path)}, cache_dir=str(tmp_path / "arrow"))["dev"]
    assert rows_fingerprint([dict(row) for row in read]) == rows_fingerprint(rows["mmbench_cn"])


def test_bad_requests_name_the_remedy():
    with pytest.raises(DataError, match="no rendered rows for 'mmvet'; there are vqav2"):
        benchmark_rows("mmvet")
    with pytest.raises(DataError, match=r"num_rows=0"):
        benchmark_rows("gqa", 0)
