"""Rendered samples: reproducible, balanced, in disjoint splits, and right by an independent reading of the scene."""

from __future__ import annotations

import colorsys
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from dop_search.data.rendered import FAMILIES, LONG_FAMILIES, RenderedQuestion, rendered_questions, rendered_samples
from dop_search.data.rendered.drawing import draw_scene_with_ids
from dop_search.data.rendered.formats import BENCHMARKS, FAMILY_BENCHMARKS, Question, prompt
from dop_search.data.rendered.scenes import COLORS, SHAPES, SPLITS, Item, Scene, split_of
from dop_search.data.samples import Sample, ValidationSet, score_answer

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
SUFFIXES = {
    "vqav2": SHORT,
    "gqa": SHORT,
    "pope": SHORT,
    "mme": SHORT,
    "mme_original": " Please answer yes or no.",
    "textvqa": SHORT,
    "vizwiz": "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT,
    "chartqa": "\nAnswer the question with a single word.",
    "scienceqa": LETTER,
    "scienceqa_context": LETTER,
    "seedbench": LETTER,
    "mmbench_en": LETTER,
    "mmbench_en_hint": LETTER,
    "mmbench_cn": "\n请直接使用所提供的选项字母作为答案回答。",
    "mmbench_cn_short": "\n请直接回答选项字母。",
    "mmbench_cn_hint": "\n请直接使用所提供的选项字母作为答案回答。",
    "ai2d": LETTER,
    "hallusionbench": "?",
    "ocrbench": "?",
    "plain": ".",
}
"""What the benchmarks append to a question, written down here once more."""


@pytest.fixture(scope="module")
def questions() -> tuple[RenderedQuestion, ...]:
    return rendered_questions("test", 40 * len(FAMILIES), seed=11)


def test_a_seed_gives_the_same_pixels_on_every_machine():
    """The digest was taken once; another one means other data than the bundled model was trained on."""
    samples = rendered_samples("search", 2 * len(FAMILIES), seed=5)
    assert ValidationSet("pocket", "search", 5, samples).fingerprint == "96ff3d9807f39e76"


def test_another_process_with_another_hash_seed_renders_the_same():
    code = (
        "from dop_search.data.rendered import rendered_samples; from dop_search.data.samples import ValidationSet; "
        "print(ValidationSet('a', 'test', 0, rendered_samples('test', 17)).fingerprint)"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "99"}
    )
    here = ValidationSet("a", "test", 0, rendered_samples("test", 17)).fingerprint
    assert other.stdout.strip() == here


def test_a_longer_request_starts_with_the_shorter_one():
    assert rendered_questions("heldout", 30, seed=2)[:12] == rendered_questions("heldout", 12, seed=2)


def test_seeds_differ_in_every_image():
    first, second = ({s.image.tobytes() for s in rendered_samples("search", 40, seed)} for seed in (0, 1))
    assert not first & second


def test_families_come_equally_often(questions):
    assert set(Counter(q.question.family for q in questions).values()) == {40}
    assert len(FAMILIES) >= 10
    assert len({q.benchmark for q in questions}) >= 15


@pytest.mark.parametrize("family", ["exist", "attribute", "compare", "choice", "choice_zh", "diagram", "count"])
def test_no_constant_answer_pays(family):
    answers = Counter(q.question.answer for q in rendered_questions("test", 200, seed=3, families=[family]))
    expected = 1 / {"choice": 4, "choice_zh": 4, "diagram": 4, "count": 5}.get(family, 2)
    assert max(answers.values()) / 200 < expected + 0.1


def test_splits_share_no_scene():
    scenes = {split: [q.scene for q in rendered_questions(split, 102, seed=0)] for split in SPLITS}
    for split, members in scenes.items():
        assert {split_of(scene) for scene in members} == {split}
    contents = {split: {scene.items for scene in members} for split, members in scenes.items()}
    for split in SPLITS:
        for other in SPLITS:
            assert split == other or not contents[split] & contents[other]


def test_background_and_clutter_do_not_decide_the_split(questions):
    scene = questions[0].scene
    assert {split_of(Scene(scene.kind, scene.items, style)) for style in range(50)} == {split_of(scene)}


def test_every_benchmark_has_its_suffix(questions):
    seen = set()
    for rendered in questions:
        for benchmark in FAMILY_BENCHMARKS[rendered.question.family]:
            text = prompt(rendered.question, benchmark)
            assert text.endswith(SUFFIXES[benchmark])
            assert rendered.question.stem.lower() in text.lower()
            for letter, option in zip("ABCD", rendered.question.options, strict=False):
                assert f"\n{letter}. {option}\n" in text
            seen.add(benchmark)
    assert seen == set(BENCHMARKS) == set(SUFFIXES)


def test_samples_ask_in_the_benchmark_format(questions):
    samples = rendered_samples("test", 40 * len(FAMILIES), seed=11)
    for sample, rendered in zip(samples, questions, strict=True):
        assert (sample.id, sample.family, sample.answers) == (
            rendered.id,
            rendered.question.family,
            (rendered.question.answer,),
        )
        assert sample.question == prompt(rendered.question, rendered.benchmark)
        assert sample.image.size == (96, 96)


# An oracle of its own: it reads the question's text and looks at the items, knowing nothing of how it was asked.

PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
CHINESE = {
    **dict(zip(("红色", "橙色", "黄色", "绿色", "青色", "蓝色", "紫色", "粉色"), COLORS, strict=True)),
    **dict(zip(("圆形", "方形", "三角形", "菱形", "星形", "十字", "圆环", "月牙"), SHAPES, strict=True)),
    **dict(zip(("左上", "上方", "右上", "左边", "中间", "右边", "左下", "下方", "右下"), PLACES, strict=True)),
}


def _match(scene: Scene, noun: str) -> list[Item]:
    """The shapes that a noun phrase names: 'red', 'rings', 'red objects', 'red ring', '红色的圆环'."""
    for chinese, english in CHINESE.items():
        noun = noun.replace(chinese, f" {english} ")
    items = [item for item in scene.items if item.kind == "shape"]
    for word in re.findall(r"[a-z]+", noun):
        if word in COLORS:
            items = [item for item in items if item.color == word]
        elif word not in ("object", "objects", "thing", "a", "an", "the"):
            items = [item for item in items if word in (item.shape, item.shape + "s", item.shape + "es")]
    return items


def _one(scene: Scene, noun: str) -> Item:
    (item,) = _match(scene, noun)
    return item


def _place_of(item: Item) -> str:
    return PLACES[int(item.center[1] // 32) * 3 + int(item.center[0] // 32)]


def _is(a: Item, b: Item, relation: str) -> bool:
    ax, ay, bx, by = *a.center, *b.center
    return {"left": ax < bx, "right": ax > bx, "above": ay < by, "below": ay > by}[relation]


def _yes(condition: bool) -> str:
    return "yes" if condition else "no"


def _oracle(scene: Scene, question: Question) -> str:
    stem = question.stem
    if found := re.fullmatch(r"What (?:color is the|is the color of the) (highest|lowest) bar\?", stem):
        bars = sorted((item for item in scene.items if item.kind == "bar"), key=lambda bar: bar.height)
        return bars[-1 if found[1] == "highest" else 0].color
    if found := re.fullmatch(r"What is the value of (?:the )?(\w+)(?: bar)?\?", stem):
        (bar,) = [item for item in scene.items if item.kind == "bar" and found[1] in (item.color, item.text)]
        base = max(item.y + item.height for item in scene.items if item.kind == "bar")
        unit = 7 if all(item.height % 7 == 0 for item in scene.items if item.kind == "bar") else 8
        assert base - bar.y == bar.height
        return str(bar.height // unit)
    if found := re.fullmatch(r"(?i)what is the (number|word) in the image\?", stem):
        (text,) = [i.text for i in scene.items if i.kind == "sign" and i.text.isdigit() == (found[1] == "number")]
        return text
    if found := re.fullmatch(r"What (?:is written on|does) the (?:(\w+) )?sign(?: say)?\?", stem):
        (text,) = [item.text for item in scene.items if item.kind == "sign" and found[1] in (None, item.color)]
        return text
    if found := re.fullmatch(r"What does the letter (\w) point to\?", stem):
        (label,) = [item for item in scene.items if item.kind == "label" and item.text == found[1]]
        return scene.items[label.target].shape
    if found := re.fullmatch(r"Which letter points to the (\w+)\?", stem):
        (letter,) = [i.text for i in scene.items if i.kind == "label" and scene.items[i.target].shape == found[1]]
        return letter
    if stem == "List all objects from left to right.":
        shapes = sorted((item for item in scene.items if item.kind == "shape"), key=lambda item: item.center[0])
        return ", ".join(f"{item.color} {item.shape}" for item in shapes)
    if stem == "Describe this picture from top left to bottom right.":
        sentences = []
        for place in PLACES:
            there = [item for item in scene.items if item.kind == "shape" and _place_of(item) == place]
            names = [f"a {item.color} {item.shape}" for item in sorted(there, key=lambda item: item.x + item.width / 2)]
            text = " and ".join(names).replace("a orange", "an orange") if names else "no object"
            sentences.append(f"In the {place} there is {text}.")
        return " ".join(sentences)
    if found := re.fullmatch(r"(?:What color is|What is the color of) the (.+)\?|图中的(.+)是什么颜色？", stem):
        matches = _match(scene, found[1] or found[2])
        return matches[0].color if len(matches) == 1 else "unanswerable"
    if found := re.fullmatch(r"What (?:shape is|is the shape of) the (.+)\?|图中(.+)的物体是什么形状？", stem):
        matches = _match(scene, found[1] or found[2])
        return matches[0].shape if len(matches) == 1 else "unanswerable"
    if found := re.fullmatch(r"How many (.+) are there\?|图中有几个(.+?)(?:的物体)?？", stem):
        return str(len(_match(scene, found[1] or found[2])))
    if found := re.fullmatch(r"Where in the image is the (.+)\?|(.+)在图中的什么位置？", stem):
        return _place_of(_one(scene, found[1] or found[2]))
    if found := re.fullmatch(r"Are there more (.+) than (.+)\?", stem):
        return _yes(len(_match(scene, found[1])) > len(_match(scene, found[2])))
    if found := re.fullmatch(r"Is there an? (.+) in the image\?", stem):
        return _yes(bool(_match(scene, found[1])))
    if found := re.fullmatch(r"Is the (.+) (to the left or to the right of|above or below) the (.+)\?", stem):
        a, b = _one(scene, found[1]), _one(scene, found[3])
        sides = ("left", "right") if "left" in found[2] else ("above", "below")
        return next(side for side in sides if _is(a, b, side))
    if found := re.fullmatch(r"Is the (.+?) (?:to the )?(left|right|above|below)(?: of)? the (.+)\?", stem):
        return _yes(_is(_one(scene, found[1]), _one(scene, found[3]), found[2]))
    if found := re.fullmatch(r"Is the (\w+)(?: object a)? (\w+)\?", stem):
        item = _one(scene, found[1])
        return _yes(found[2] in (item.color, item.shape))
    raise AssertionError(f"the oracle cannot read {stem!r}")


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_right(questions, family):
    for rendered in (q for q in questions if q.question.family == family):
        question, truth = rendered.question, _oracle(rendered.scene, rendered.question)
        if question.options:
            options = [CHINESE.get(option, option) for option in question.options]
            assert len(set(options)) == 4
            assert options["ABCD".index(question.answer)] == truth
        else:
            assert question.answer == truth


def test_long_answers_come_on_request_and_are_right():
    asked = rendered_questions("test", 30, seed=11, families=LONG_FAMILIES)
    for rendered in asked:
        assert rendered.question.answer == _oracle(rendered.scene, rendered.question)
        assert rendered.question.answer.count("In the ") == 9
    assert len({rendered.question.answer for rendered in asked}) == 30
    assert not set(LONG_FAMILIES) & {sample.family for sample in rendered_samples("test", 2 * len(FAMILIES), seed=11)}


HUES = {"red": 0, "orange": 31, "yellow": 54, "green": 128, "cyan": 184, "blue": 229, "purple": 282, "pink": 333}


def test_every_object_is_visible_in_its_color(questions):
    """The items are really drawn, nothing covers them, and the pixels' hue is nearest to the colour's."""
    for rendered in questions[:170]:
        image, ids = draw_scene_with_ids(rendered.scene)
        for index, item in enumerate(rendered.scene.items):
            if item.kind != "shape":
                continue
            pixels = image[ids == index + 1].astype(float)
            assert len(pixels) > 0.2 * item.width * item.height
            hue = 360 * colorsys.rgb_to_hsv(*np.median(pixels, axis=0) / 255)[0]
            nearest = min(HUES, key=lambda name: abs((HUES[name] - hue + 180) % 360 - 180))
            assert nearest == item.color


def test_bad_requests_name_the_remedy():
    with pytest.raises(ValueError, match=r"'colour'; did you mean 'color'"):
        rendered_samples("test", 3, families=["colour"])
    with pytest.raises(ValueError, match=r"num_samples=0"):
        rendered_samples("test", 0)
    with pytest.raises(ValueError, match=r"split must be one of .* but got 'dev'"):
        rendered_samples("dev", 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one of"):
        rendered_samples("test", 3, families=[])
    with pytest.raises(ValueError, match="needs options"):
        prompt(Question("color", "What color is the ring?", "red"), "seedbench")


def test_scoring_ignores_case_space_and_final_dots():
    sample = Sample("a", Image.new("RGB", (4, 4)), "?", ("top left", "upper left"), "where")
    assert score_answer(" Top left. ", sample)
    assert score_answer("upper left", sample)
    assert not score_answer("top", sample)
    assert not score_answer("", sample)
