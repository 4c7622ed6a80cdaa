"""Validation sets: disjoint splits, and errors that name the line."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from dop_search.data.jsonl import read_jsonl
from dop_search.data.samples import score_answer
from dop_search.data.validation import SPLITS, file_rows, validation_set
from dop_search.utils.errors import DataError


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
        ('{"question": "?", "image": null}', r"line 13 lacks \['image'\]; it has \['image', 'question'\]"),
        (
            '{"image": ["0.png", 1], "question": "?"}',
            r"line 13: `image` must be the path of an image, or a list .* 1\]",
        ),
        ('{"image": [], "question": "?"}', r"line 13 lacks \['image'\]"),
        ('{"image": "0.png", "question": ["?"]}', r"line 13: `question` must be a text, but got \['\?'\]"),
        ('{"image": "0.png", "question": true}', r"line 13: `question` must be a text, but got True"),
        ('{"image": "0.png", "question": "<image>"}', r"line 13: the question is blank"),
        (
            '{"image": "0.png", "question": "<image> or <image>?"}',
            r"line 13: the question has '<image>' 2 times, but 1",
        ),
        ('{"image": ["0.png", "1.png"], "question": "a <image>"}', r"line 13: .*'<image>' 1 times, but 2 images"),
        ('{"image": "0.png", "question": "\\ud800?"}', r"line 13: `question` holds a NUL or half of a surrogate pair"),
        ('{"image": "0\\u0000.png", "question": "?"}', r"line 13: `image` holds a NUL"),
        ('{"image": "0.png", "question": "?", "answer": NaN}', r"line 13 is not JSON: NaN is not allowed"),
        ('{"image": "0.png", "question": "?", "answer": 1e999}', r"line 13: `answer` must be a text, .* but got inf"),
        ('{"image": "0.png", "question": "?", "answer": true}', r"line 13: `answer` must be a text, a number or"),
        ('{"image": "0.png", "question": "?", "system": 3}', r"line 13: `system` must be a text, but got 3"),
        ('{"image": "0.png", "images": "1.png", "question": "?"}', r"line 13 has both `image` and `images`"),
        ('{"image": "0.png", "conversations": []}', r"line 13 lacks \['question'\]"),
        ('{"image": "0.png", "conversations": ["?"]}', r"line 13: `conversations` must list turns with `from` and"),
        ('{"image": "0.png", "conversations": [{"from": "bot", "value": "?"}]}', r"must be one of .*but got 'bot'"),
        (
            '{"image": "0.png", "conversations": [{"from": "gpt", "value": "?"}]}',
            r"line 13: .* must begin with a question",
        ),
        ('{"image": "0.png", "question": "?", "messages": []}', r"line 13 has both `question` and `messages`"),
        (
            '{"image": "0.png", "conversations": [{"from": "system", "value": "a"}, {"from": "system", "value": "b"}]}',
            r"line 13: `conversations` must begin with a question, and may have one system prompt",
        ),
        (
            '{"image": "0.png", "system": "a", "messages": [{"role": "system", "content": "b"}, '
            '{"role": "user", "content": "?"}]}',
            r"line 13 has `system` both in `messages` and beside it",
        ),
        ('{"image": "0.png", "conversations": [], "messages": []}', r"has both `messages` and `conversations`"),
        ('{"image": "0.png", "question": "?", "answers": ["x"]}', r"line 13: did you mean `answer` by 'answers'\?"),
        ('{"image": "0.png", "question": "?", "anwser": "x"}', r"line 13: did you mean `answer` by 'anwser'\?"),
        ('{"image": "0.png", "question": "?", "Answer": "x"}', r"line 13: did you mean `answer` by 'Answer'\?"),
        ('{"image": "0.png", "question": "?", "system": 0}', r"line 13: `system` must be a text, but got 0"),
        ('{"image": "0.png", "question": "?", "system": []}', r"line 13: `system` must be a text, but got \[\]"),
        ('{"image": "0.png", "question": "?", "id": ""}', r"line 13: `id` is blank; leave it out for 'mine/000013'"),
        ('{"image": "0.png", "question": "?", "family": " "}', r"line 13: `family` is blank; leave it out for 'all'"),
        ('{"a":' * 20_000, r"line 13 is not JSON: maximum recursion depth"),
        ('{"image": "0.png", "question": "?", "answer": {"a": 1}}', r"line 13: `answer` must be a text, a number or"),
        ('{"image": "0.png", "question": "?", "id": "mine/000002"}', r"line 13 has the id 'mine/000002' of .* line 2;"),
        ('{"image": "no.png", "question": "?", "answer": "x"}', r"line 13: cannot read the image .*no\.png"),
        ('{"image": "mine.jsonl", "question": "?", "answer": "x"}', r"line 13: cannot read the image"),
    ],
)
def test_a_bad_line_is_named(file, line, message):
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(DataError, match=message):
        read_jsonl(file)


def test_keys_of_others_are_left_alone_and_a_system_prompt_may_stand_beside_turns(file):
    turns = '"messages": [{"role": "user", "content": "?"}], "system": "Be brief.", "answer": "x"'
    names = '"question_id": 3, "image_id": 4, "question_type": "a", "answer_type": "b", "idx": 5, "content": "c"'
    file.write_text('{"image": "0.png", ' + turns + ", " + names + "}")
    (row,) = read_jsonl(file)
    assert (row.question, row.answers, row.system) == ("?", ("x",), "Be brief.")


def test_bad_requests_name_the_remedy(file, tmp_path):
    with pytest.raises(
        DataError,
        match=r"12 usable samples and 12 different images.*search 4 of 5 .*takes 13 lines.*lower data.num_samples",
    ):
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


def write(path, lines):
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return path


def test_lines_of_one_image_stay_together_also_under_other_names(file, tmp_path):
    for index in range(6):
        (tmp_path / f"copy{index}.png").write_bytes((tmp_path / f"{index}.png").read_bytes())
    lines = [{"image": f"{index}.png", "question": f"{q}?", "family": q} for index in range(6) for q in "abc"]
    lines += [{"image": f"copy{index}.png", "question": "d?", "family": "d"} for index in range(6)]
    path = write(tmp_path / "several.jsonl", lines)
    parts = {split: validation_set("jsonl", 8, split=split, path=path, seed=5) for split in SPLITS}
    images = {split: {sample.image.tobytes() for sample in part} for split, part in parts.items()}
    assert [len(its) for its in images.values()] == [2, 2, 2]
    assert len(set.union(*images.values())) == 6
    one = {split: validation_set("jsonl", 2, split=split, path=path, seed=5, families=["b"]) for split in SPLITS}
    for split in SPLITS:
        assert {sample.image.tobytes() for sample in one[split]} == images[split], "the families do not move an image"


def test_where_each_line_has_its_own_image_every_third_shuffled_line_is_of_the_same_split(file):
    order = np.random.default_rng(3).permutation(12)
    for place, split in enumerate(SPLITS):
        expected = [f"mine/{index + 1:06d}" for index in order[place::3]]
        assert [*validation_set("jsonl", 4, seed=3, split=split, path=file).ids] == expected


@pytest.mark.parametrize("sizes", [(5, 3, 0), (2, 5, 4), (1, 2, 4)])
def test_as_many_lines_as_the_error_asks_for_are_enough_and_one_less_is_not(file, tmp_path, sizes):
    wanted = dict(zip(SPLITS, sizes, strict=True))
    with pytest.raises(DataError, match=r"takes \d+ lines") as caught:
        file_rows(write(tmp_path / "one.jsonl", [{"image": "0.png", "question": "?"}]), wanted)
    needed = int(re.search(r"takes (\d+) lines", str(caught.value)).group(1))
    for index in range(12, needed):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / f"{index}.png")
    lines = [{"image": f"{index}.png", "question": "?"} for index in range(needed)]
    found = file_rows(write(tmp_path / "enough.jsonl", lines), wanted)
    assert tuple(len(rows) for rows in found.values()) == sizes
    with pytest.raises(DataError, match=r"add lines, or lower data\.num_"):
        file_rows(write(tmp_path / "less.jsonl", lines[:-1]), wanted)
    with pytest.raises(DataError, match=r"lower data\.num_samples \(or data\.num_decision"):
        file_rows(tmp_path / "less.jsonl", {"search": 99})


def test_answers_are_texts_numbers_or_lists_and_need_not_be_known(file, tmp_path):
    given = [0, 2.5, "no", ["a", 1, None], None, "", [], [" "]]
    lines = [{"image": f"{index}.png", "question": "?", "answer": answer} for index, answer in enumerate(given)]
    rows = read_jsonl(write(tmp_path / "answers.jsonl", [*lines, {"image": "9.png", "question": "Is it\u2028?"}]))
    assert [row.answers for row in rows] == [("0",), ("2.5",), ("no",), ("a", "1"), (), (), (), (), ()]
    assert score_answer("0", rows[0].sample())
    with pytest.raises(DataError, match=r"'answers/000005' has no answer.*data\.num_test=0"):
        score_answer("0", rows[4].sample())
    assert len(validation_set("jsonl", 3, path=tmp_path / "answers.jsonl")) == 3


def test_a_file_in_another_encoding_is_named(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes('{"question": "où?"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.jsonl' is not UTF-8 text"):
        read_jsonl(tmp_path / "latin.jsonl")
