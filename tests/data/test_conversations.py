"""Lines with several images, system prompts and conversations: what is read of them, and what the model is given."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from support.tiny_families import tiny_processor
from support.tiny_models import tiny_model

import dop_search as dop
from dop_search.data.jsonl import read_jsonl
from dop_search.data.samples import Sample, ValidationSet
from dop_search.data.validation import SPLITS, file_rows
from dop_search.divergence import make_teacher
from dop_search.models import FAMILIES, adapter_for
from dop_search.models.fingerprint import weights_fingerprint
from dop_search.models.loading import LoadedModel
from dop_search.models.prompts import chat_prompt, model_inputs, sample_prompt
from dop_search.selectors import make_selector
from dop_search.testing.processors import drawn_image
from dop_search.utils.errors import DataError, DopError

processor_of = cache(tiny_processor)


@pytest.fixture
def folder(tmp_path):
    for index in range(9):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / f"{index}.png")
    return tmp_path


def rows_of(folder, *items, as_list=False):
    path = folder / "mine.jsonl"
    path.write_text(json.dumps(items) if as_list else "\n".join(json.dumps(item) for item in items))
    return read_jsonl(path)


LLAVA = {
    "id": "000000033471",
    "image": "0.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat are the colors of the bus?"},
        {"from": "gpt", "value": "The bus is white and red."},
        {"from": "human", "value": "What is on its back?"},
        {"from": "gpt", "value": "An advertisement."},
    ],
}
"""As in LLaVA-Instruct-150K."""
MESSAGES = {
    "images": ["1.png", "2.png"],
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Is <image> older than <image>?"},
        {"role": "assistant", "content": "Yes."},
    ],
}
"""As in files for fine-tuning with ShareGPT's turns."""


@pytest.mark.parametrize("as_list", [False, True], ids=["lines", "list"])
def test_the_first_question_of_a_conversation_and_its_answer_are_read(as_list, folder):
    first, second = rows_of(folder, LLAVA, MESSAGES, as_list=as_list)
    assert (first.id, first.question, first.answers) == (
        "000000033471",
        "What are the colors of the bus?",
        ("The bus is white and red.",),
    )
    assert (second.question, second.answers, second.system) == (
        "Is <image> older than <image>?",
        ("Yes.",),
        "Be brief.",
    )
    sample = second.sample()
    assert [image.getpixel((0, 0))[0] for image in sample.images] == [1, 2]
    assert "item 2" in second.where if as_list else "line 2" in second.where


def test_a_conversation_without_an_answer_has_none(folder):
    (row,) = rows_of(folder, {**LLAVA, "conversations": LLAVA["conversations"][:1]})
    assert row.answers == ()


def test_samples_that_share_an_image_are_in_one_split(folder):
    """0-1-2 and 5-6 are tied together by the lines that have two of them."""
    pairs = [["0.png", "1.png"], ["1.png", "2.png"], ["3.png"], ["4.png"], ["5.png", "6.png"], ["6.png"], ["7.png"]]
    rows_of(folder, *({"image": pair, "question": f"{index}?"} for index, pair in enumerate(pairs)))
    for seed in range(6):
        sizes = dict.fromkeys(SPLITS, 1)
        parts = file_rows(folder / "mine.jsonl", sizes, seed)
        images = [{path for row in part for path in row.images} for part in parts.values()]
        assert len(set.union(*images)) == sum(map(len, images))
    assert {len(file_rows(folder / "mine.jsonl", {"search": n}, 0)["search"]) for n in (1, 2)} == {1, 2}


def test_a_fingerprint_knows_every_image_and_the_system_prompt():
    images = [drawn_image(20, 20, seed) for seed in range(3)]
    plain = Sample("a", images[0], "?", (), "all")
    others = [
        Sample("a", images[0], "?", (), "all", (images[1],)),
        Sample("a", images[0], "?", (), "all", (images[2],)),
        Sample("a", images[0], "?", (), "all", system="Be brief."),
    ]
    prints = {ValidationSet("mine", "search", 0, (sample,)).fingerprint for sample in (plain, *others)}
    assert len(prints) == 4


# -- prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_images_stand_where_the_question_says(family):
    """By the template's own account of the same content."""
    processor = processor_of(family)
    part = {"type": "image"}
    content = [{"type": "text", "text": "Is "}, part, {"type": "text", "text": " like "}, part]
    expected = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert chat_prompt(processor, "Is <image> like <image>", 2) == expected
    content = [part, part, {"type": "text", "text": "Alike?"}]
    expected = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert chat_prompt(processor, "Alike?", 2) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_samples_with_one_and_several_images_is_answered_as_each_alone(family):
    model, processor = tiny_model(family), processor_of(family)
    images = [drawn_image(56, 40, 0), drawn_image(30, 70, 1), drawn_image(50, 50, 2)]
    samples = (
        Sample("one", images[0], "What?", ("a",), "all", system="Be brief."),
        Sample("two", images[1], "Is <image> or <image>?", ("a",), "all", (images[2],)),
    )
    adapter = adapter_for(model)
    batch = model_inputs(processor, samples, torch.device("cpu"))
    singles = [model_inputs(processor, [sample], torch.device("cpu")) for sample in samples]
    with torch.no_grad():
        together = model(**batch).logits[:, -1]
        alone = torch.cat([model(**single).logits[:, -1] for single in singles])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    loaded = LoadedModel(family, model, processor, adapter, weights_fingerprint(model))
    data = ValidationSet("mine", "search", 0, samples)
    teacher = make_teacher(loaded, data, make_selector("uniform_grid"), max_new_tokens=2)
    for known, single in zip(teacher.samples, singles, strict=True):
        assert known.encoded.num_visual == int(adapter.visual_token_mask(single["input_ids"]).sum())


def test_a_model_without_system_prompts_says_so(pocket):
    with pytest.raises(
        DataError, match=r"takes no system prompt \(roles must be user or assistant.*leave `system` out"
    ):
        chat_prompt(pocket.processor, "?", system="Be brief.")


def test_a_template_that_drops_the_system_prompt_is_no_silence():
    processor = tiny_processor("qwen2_vl")
    processor.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'][1]['text'] }}{% endif %}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"drops the system prompt"):
        chat_prompt(processor, "What?", system="Be brief.")


def test_the_place_of_an_image_in_a_text_names_the_sample(pocket):
    sample = Sample("mine/7", drawn_image(20, 20), "What?", (), "all", system="See <image>.")
    with pytest.raises(DataError, match=r"the sample 'mine/7': the text holds '<image>'"):
        sample_prompt(pocket.processor, sample)
    with pytest.raises(DataError, match=r"'mine/7': the question has '<image>' 2 times, but 1 images"):
        Sample("mine/7", drawn_image(20, 20), "<image> and <image>", (), "all")


def test_llava_s_files_are_searched(pocket, few_samples, tmp_path):
    lines = []
    for index, sample in enumerate(few_samples):
        sample.image.save(tmp_path / f"{index}.png")
        turns = [{"from": "human", "value": f"{sample.question}\n<image>"}, {"from": "gpt", "value": sample.answers[0]}]
        lines.append({"image": f"{index}.png", "conversations": turns})
    (tmp_path / "llava.json").write_text(json.dumps(lines))
    data = dop.validation_set("jsonl", path=tmp_path / "llava.json", num_samples=2)
    questions = {sample.question for sample in few_samples}
    assert {sample.question for sample in data} <= questions
    teacher = make_teacher(pocket, data, make_selector("uniform_grid"), max_new_tokens=2)
    assert {sample.encoded.num_visual for sample in teacher.samples} == {256}


# -- any line -------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["0.png", "1.png", "<image>", "<image> a <image>", "human", "gpt", "\ud800", "\0", "", "absent"])
    | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["from", "value", "role", "content", "a"]), inner, max_size=3)
    ),
    max_leaves=8,
)
KEYS = ["image", "images", "question", "answer", "id", "family", "system", "conversations", "messages"]


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3), drop=st.sets(st.sampled_from(KEYS[:3])))
def test_any_line_is_a_sample_or_refused_in_words(changes, drop, folder):
    item = {name: value for name, value in {"image": "0.png", "question": "What?"}.items() if name not in drop}
    item |= changes
    (folder / "fuzz.jsonl").write_text(json.dumps(item))
    try:
        (row,) = read_jsonl(folder / "fuzz.jsonl")
    except DopError as error:
        _names_the_line(error)
        return
    sample = row.sample()
    assert all(isinstance(text, str) for text in (row.id, row.question, row.family, row.system, *row.answers))
    "".join((row.id, row.question, row.family, row.system, *row.answers)).encode()
    assert sample.question.count("<image>") in (0, len(sample.images))
    given = item.get("image", item.get("images"))
    assert len(sample.images) == (len(given) if isinstance(given, list) else 1)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=st.binary(max_size=60) | st.text(alphabet='[]{}",:\\u0d8ae1N\n ', max_size=40).map(str.encode))
def test_any_bytes_are_refused_in_words(content, folder):
    (folder / "fuzz.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"fuzz\.jsonl"):
        read_jsonl(folder / "fuzz.jsonl")


def _names_the_line(error):
    assert "line 1" in str(error), error
