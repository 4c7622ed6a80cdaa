"""Draw ``examples.png``: one rendered image per question family of the test split, with its question and answer.

    python experiments/pocket/examples.py

Chinese questions are glossed in English, so that the sheet needs no Chinese font.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from dop_search.data.rendered import FAMILIES, rendered_questions
from dop_search.data.rendered.drawing import draw_scene
from dop_search.data.rendered.formats import Question
from dop_search.data.rendered.questions import COLORS_ZH, PLACES, PLACES_ZH, SHAPES_ZH
from dop_search.data.rendered.scenes import COLORS, SHAPES
from dop_search.utils.files import write_atomic

HERE = Path(__file__).parent
SEED = 4
_TEMPLATES = {
    "图中有几个": "How many: ",
    "在图中的什么位置？": ": where in the image?",
    "是什么颜色？": ": what color?",
    "的物体是什么形状？": " object: what shape?",
    "的物体？": " objects?",
    "图中的": "",
    "图中": "",
    "的": " ",
}
GLOSSES = {
    **_TEMPLATES,
    **dict(zip(COLORS_ZH, COLORS, strict=True)),
    **dict(zip(SHAPES_ZH, SHAPES, strict=True)),
    **dict(zip(PLACES_ZH, PLACES, strict=True)),
}


def gloss(text: str) -> str:
    """English for the Chinese of ``choice_zh``, word by word."""
    for chinese, english in GLOSSES.items():
        text = text.replace(chinese, english)
    return text


def caption(question: Question) -> str:
    """The bare question, its options and the answer, wrapped."""
    stem = gloss(question.stem)
    if stem != question.stem:
        stem = f"(Chinese) {stem}"
    options = "  ".join(f"{letter}. {gloss(text)}" for letter, text in zip("ABCD", question.options, strict=False))
    lines = [*textwrap.wrap(stem, 30), *textwrap.wrap(options, 30), *textwrap.wrap(f"→ {question.answer}", 30)]
    return "\n".join(lines)


def main() -> None:
    columns = 6
    figure, grid = plt.subplots(3, columns, figsize=(11, 8), layout="constrained")
    for axes in grid.flat:
        axes.axis("off")
    for axes, rendered in zip(grid.flat, rendered_questions("test", len(FAMILIES), SEED), strict=False):
        axes.imshow(draw_scene(rendered.scene), interpolation="nearest")
        axes.set_title(rendered.question.family, fontsize=9, fontweight="bold")
        axes.text(0, 100, caption(rendered.question), fontsize=7.5, va="top")
    write_atomic(HERE / "examples.png", lambda path: figure.savefig(path, dpi=72))


if __name__ == "__main__":
    main()
