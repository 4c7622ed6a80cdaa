"""Rendered questions as rows of the benchmarks, in memory and as Parquet files that ``datasets`` reads: the columns
that their lmms-eval tasks read, and the questions that the bundled model knows.

Scenes are of the ``test`` split, which shares no scene with training, search or held-out data, and from a seed of their
own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

from PIL import Image

from dop_search.data.rendered.drawing import draw_scene
from dop_search.data.rendered.questions import QUESTION_FAMILIES
from dop_search.data.rendered.sampling import RenderedQuestion, derived_rng, rendered_questions
from dop_search.data.rendered.scenes import Scene, sample_scene
from dop_search.data.tables import quiet
from dop_search.utils.errors import DataError
from dop_search.utils.files import write_atomic

Row: TypeAlias = dict[str, Any]

VERSION = 1
"""Raise it whenever rows change: the number is part of the files' folder."""
SEED = 1300
"""The first of as many seeds as there are benchmarks, so that no two of them ask the same questions."""
NUM_ROWS = 100
_NUM_ANNOTATORS = 10
_HINT = "The picture shows several things."
_MME_FAMILIES = {"existence": "exist", "color": "attribute", "position": "relation"}
_MME_SUFFIX = " Please answer yes or no."
_TRIES = 30


def benchmark_file(benchmark: str, folder: Path) -> Path:
    """The Parquet file of a benchmark's rendered rows below ``folder``, made on first use; DataError if unknown."""
    path = folder / rendered_version() / f"{benchmark}.parquet"
    if not path.exists():
        rows = benchmark_rows(benchmark, NUM_ROWS)
        write_atomic(path, lambda temporary: _write(rows, temporary))
    return path


def rendered_version() -> str:
    """Names the rows: another name, other rows."""
    return f"rendered-{VERSION}-{SEED}-{NUM_ROWS}"


def _write(rows: list[Row], path: Path) -> None:
    import datasets

    with quiet():
        datasets.Dataset.from_list(rows).to_parquet(path)


def benchmark_rows(benchmark: str, num_rows: int = NUM_ROWS) -> list[Row]:
    """At least so many rows with a PIL image each; the same on every machine. A longer request starts with the shorter
    one, and rows that are scored together are never cut apart.

    Raises:
        DataError: an unknown benchmark, or fewer than one row.
    """
    if benchmark not in _ROWS:
        raise DataError(f"no rendered rows for {benchmark!r}; there are {', '.join(_ROWS)}")
    if num_rows < 1:
        raise DataError(f"`num_rows >= 1` must hold, but got (num_rows={num_rows})")
    rows = _ROWS[benchmark](num_rows, SEED + list(_ROWS).index(benchmark))
    return [{**row, "image": Image.fromarray(draw_scene(row["image"]))} for row in rows]


def _asked(families: Sequence[str], convert: Callable[[int, RenderedQuestion], Row]) -> Callable[[int, int], list[Row]]:
    def rows(num_rows: int, seed: int) -> list[Row]:
        questions = rendered_questions("test", num_rows, seed, families)
        return [{"image": q.scene, **convert(index, q)} for index, q in enumerate(questions)]

    return rows


def _vqav2(index: int, asked: RenderedQuestion) -> Row:
    answer = asked.question.answer
    annotators = [{"answer": answer, "answer_confidence": "yes", "answer_id": n} for n in range(1, _NUM_ANNOTATORS + 1)]
    return {
        "question": asked.question.stem,
        "question_id": index,
        "image_id": index,
        "question_type": asked.question.family,
        "answer_type": "other",
        "multiple_choice_answer": answer,
        "answer": answer,
        "answers": annotators,
    }


def _gqa(index: int, asked: RenderedQuestion) -> Row:
    return {
        "id": str(index),
        "imageId": f"n{index}",
        "question": asked.question.stem,
        "answer": asked.question.answer,
        "fullAnswer": asked.question.answer,
        "isBalanced": True,
    }


def _open_answers(index: int, asked: RenderedQuestion) -> Row:
    """VizWiz and TextVQA: one string per annotator."""
    answer = asked.question.answer
    return {
        "question_id": str(index),
        "question": asked.question.stem,
        "answer": answer,
        "answers": [answer] * _NUM_ANNOTATORS,
        "ocr_tokens": [answer],
    }


def _scienceqa(index: int, asked: RenderedQuestion) -> Row:
    return {
        "question": asked.question.stem,
        "choices": list(asked.question.options),
        "answer": "ABCD".index(asked.question.answer),
        "hint": _HINT if asked.benchmark == "scienceqa_context" else "",
    }


def _pope(index: int, asked: RenderedQuestion) -> Row:
    return {
        "id": str(index),
        "question_id": str(index),
        "question": asked.question.stem,
        "answer": asked.question.answer,
        "image_source": f"rendered_{index}",
        "category": "adversarial",
    }


def _mmbench(hint: str) -> Callable[[int, RenderedQuestion], Row]:
    def convert(index: int, asked: RenderedQuestion) -> Row:
        return {
            "index": index,
            "question": asked.question.stem,
            "hint": hint if asked.benchmark.endswith("_hint") else "nan",
            "answer": asked.question.answer,
            **dict(zip("ABCD", asked.question.options, strict=True)),
            "category": "object_localization",
            "L2-category": "finegrained_perception (instance-level)",
            "source": "rendered",
            "split": "dev",
        }

    return convert


def _ai2d(index: int, asked: RenderedQuestion) -> Row:
    return {
        "question": asked.question.stem,
        "options": list(asked.question.options),
        "answer": str("ABCD".index(asked.question.answer)),
    }


def _chartqa(index: int, asked: RenderedQuestion) -> Row:
    return {
        "question": asked.question.stem,
        "answer": asked.question.answer,
        "type": "human_test" if asked.question.family == "chart_extreme" else "augmented_test",
    }


def _ocrbench(index: int, asked: RenderedQuestion) -> Row:
    digits = asked.question.answer.isdigit()
    return {
        "dataset": "IIIT5K",
        "question": asked.question.stem,
        "question_type": "Digit String Recognition" if digits else "Regular Text Recognition",
        "answer": [asked.question.answer],
    }


def _mme_rows(num_rows: int, seed: int) -> list[Row]:
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


def _hallusionbench_rows(num_rows: int, seed: int) -> list[Row]:
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


_ROWS: dict[str, Callable[[int, int], list[Row]]] = {
    "vqav2": _asked(("color", "shape", "count"), _vqav2),
    "gqa": _asked(("relation", "where"), _gqa),
    "vizwiz": _asked(("unanswerable",), _open_answers),
    "scienceqa": _asked(("choice",), _scienceqa),
    "textvqa": _asked(("read",), _open_answers),
    "pope": _asked(("exist",), _pope),
    "mme": _mme_rows,
    "mmbench_en": _asked(("choice",), _mmbench(_HINT)),
    "mmbench_cn": _asked(("choice_zh",), _mmbench("请看图回答问题。")),
    "ai2d": _asked(("diagram",), _ai2d),
    "chartqa": _asked(("chart", "chart_extreme"), _chartqa),
    "ocrbench": _asked(("ocr",), _ocrbench),
    "hallusionbench": _hallusionbench_rows,
}

RENDERED_BENCHMARKS: tuple[str, ...] = tuple(_ROWS)
"""The benchmarks that have rendered rows."""
