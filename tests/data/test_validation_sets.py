"""Validation sets: disjoint splits, and errors that name the line."""

import json

import pytest
from PIL import Image

from dop_search.data.jsonl import jsonl_samples
from dop_search.data.validation import validation_set
from dop_search.errors import DataError


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.jsonl"
    lines = []
    for index in range(12):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / f"{index}.png")
        lines.append(json.dumps({"image": f"{index}.png", "question": f"What is {index}?", "answer": str(index)}))
    path.write_text("\n".join(lines) + "\n")
    return path


def test_splits_of_a_file_share_no_sample(file):
    parts = [validation_set("jsonl", 4, split=split, path=file).ids for split in ("search", "heldout", "test")]
    assert len(set().union(*parts)) == 12


def test_splits_of_the_rendered_data_share_no_question_on_the_same_image():
    seen = [
        {(sample.image.tobytes(), sample.question) for sample in validation_set("pocket", 60, split=split)}
        for split in ("search", "heldout", "test")
    ]
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]


def test_a_seed_fixes_the_set(file):
    assert validation_set("pocket", 9, seed=3).fingerprint == validation_set("pocket", 9, seed=3).fingerprint
    assert validation_set("pocket", 9, seed=3).fingerprint != validation_set("pocket", 9, seed=4).fingerprint
    assert validation_set("jsonl", 4, seed=1, path=file).ids != validation_set("jsonl", 4, seed=2, path=file).ids


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 13 is not JSON"),
        ("[1]", r"line 13 must be an object"),
        ('{"image": "0.png", "question": "?"}', r"line 13 lacks \['answer'\]"),
        ('{"image": "no.png", "question": "?", "answer": "x"}', r"line 13: cannot read the image .*no\.png"),
        ('{"image": "mine.jsonl", "question": "?", "answer": "x"}', r"line 13: cannot read the image"),
    ],
)
def test_a_bad_line_is_named(file, line, message):
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(DataError, match=message):
        jsonl_samples(file)


def test_bad_requests_name_the_remedy(file, tmp_path):
    with pytest.raises(DataError, match=r"12 usable samples.*lower data.num_samples"):
        validation_set("jsonl", 5, path=file)
    with pytest.raises(DataError, match="num_samples >= 1"):
        validation_set("pocket", 0)
    with pytest.raises(DataError, match=r"no families.*colour"):
        validation_set("pocket", 5, families=["colour"])
    with pytest.raises(DataError, match=r"unknown validation set 'coco'.*pocket"):
        validation_set("coco")
    with pytest.raises(DataError, match="no validation file"):
        validation_set("jsonl", 5, path=tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no samples"):
        validation_set("jsonl", 5, path=tmp_path / "empty.jsonl")
