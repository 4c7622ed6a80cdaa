"""Benchmarks that score questions together: MME's pairs and HallusionBench's sets, rendered."""

from __future__ import annotations

import re
from random import Random
from typing import Any, TypeAlias

from dop_search.data.rendered.questions import QUESTION_FAMILIES
from dop_search.data.rendered.sampling import derived_rng
from dop_search.data.rendered.scenes import Scene, sample_scene

Row: TypeAlias = dict[str, Any]

_MME_FAMILIES = {"existence": "exist", "color": "attribute", "position": "relation"}
_MME_SUFFIX = " Please answer yes or no."
_TRIES = 30


def mme_rows(num_rows: int, seed: int) -> list[Row]:
    """Pairs of questions about one image, one with the answer yes and one with no; categories in turn.

    MME's other categories need knowledge or skills that rendered scenes do not ask for.
    """
    rows: list[Row] = []
    categories = tuple(_MME_FAMILIES)
    for index in range(-(-num_rows // 2)):
        category = categories[index % len(categories)]
        rng = derived_rng("benchmarks", "mme", seed, index)
        scene, stems = _pair(rng, category)
        rows += [
            {
                "image": scene,
                "question_id": f"{category}/{index:04d}.png",
                "question": stem + _MME_SUFFIX,
                "answer": answer.capitalize(),
                "category": category,
            }
            for answer, stem in stems.items()
        ]
    return rows


def _pair(rng: Random, category: str) -> tuple[Scene, dict[str, str]]:
    while True:
        scene = sample_scene(rng, "objects", "test")
        stems = {answer: _stem(rng, scene, category, answer) for answer in ("yes", "no")}
        found = {answer: stem for answer, stem in stems.items() if stem is not None}
        if len(found) == 2:
            return scene, found


def _stem(rng: Random, scene: Scene, category: str, answer: str) -> str | None:
    for _ in range(_TRIES):
        question = QUESTION_FAMILIES[_MME_FAMILIES[category]].ask(rng, scene, answer)
        if question is not None and (category != "color" or " object a " not in question.stem):
            return question.stem
    return None


def hallusionbench_rows(num_rows: int, seed: int) -> list[Row]:
    """Sets of two figures with the same two questions, which contradict each other, so that both answers differ."""
    rows: list[Row] = []
    for index in range(-(-num_rows // 4)):
        rng = derived_rng("benchmarks", "hallusionbench", seed, index)
        figures, nouns = _contradicting(rng)
        for figure, scene in enumerate(figures, start=1):
            for question in (0, 1):
                more, fewer = nouns if question == 0 else nouns[::-1]
                right = _count(scene, more) > _count(scene, fewer)
                rows.append(
                    {
                        "image": scene,
                        "category": "VD",
                        "subcategory": "figure",
                        "visual_input": "1",
                        "set_id": str(index),
                        "figure_id": str(figure),
                        "question_id": str(question),
                        "sample_note": "",
                        "question": f"Are there more {more} than {fewer}?",
                        "gt_answer": str(int(right)),
                        "gt_answer_details": f"There are {'' if right else 'not '}more {more} than {fewer}.",
                        "filename": f"./rendered/{index}_{figure}.png",
                    }
                )
    return rows


def _contradicting(rng: Random) -> tuple[tuple[Scene, Scene], tuple[str, str]]:
    """Two scenes and two plural nouns: more of the first noun in the one scene, more of the second in the other."""
    question = None
    while question is None:
        first = sample_scene(rng, "objects", "test")
        question = QUESTION_FAMILIES["compare"].ask(rng, first, "yes")
    _, more, fewer = re.split(" more | than ", question.stem.rstrip("?"))
    nouns = more, fewer
    while True:
        second = sample_scene(rng, "objects", "test")
        if _count(second, nouns[0]) < _count(second, nouns[1]):
            scenes = (first, second) if rng.random() < 0.5 else (second, first)
            return scenes, nouns


def _count(scene: Scene, plural: str) -> int:
    singular = "cross" if plural == "crosses" else plural.removesuffix("s")
    return sum(scene.items[i].shape == singular for i in scene.shapes)
