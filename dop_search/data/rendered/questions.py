"""Question families over objects: colour, shape, number, place, relations, in English and Chinese.

Every function takes a scene and returns a question, or None where the scene does not offer one. Answers are drawn
evenly before a scene is looked for (``want``), so that guessing never pays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from dop_search.data.rendered.formats import Question, stem_of
from dop_search.data.rendered.reading import ask_chart, ask_chart_extreme, ask_diagram, ask_ocr, ask_read
from dop_search.data.rendered.scenes import COLORS, SHAPES, SIZE_PX, Item, Scene, SceneKind

Ask = Callable[[Random, Scene, str], Question | None]

PLACES = (
    *("top left", "top", "top right"),
    *("left", "center", "right"),
    *("bottom left", "bottom", "bottom right"),
)
PLACES_ZH = ("左上", "上方", "右上", "左边", "中间", "右边", "左下", "下方", "右下")
COLORS_ZH = ("红色", "橙色", "黄色", "绿色", "青色", "蓝色", "紫色", "粉色")
SHAPES_ZH = ("圆形", "方形", "三角形", "菱形", "星形", "十字", "圆环", "月牙")
_LETTERS = ("A", "B", "C", "D")
_COUNTS = ("1", "2", "3", "4", "5")
_RELATIONS = ("left", "right", "above", "below")
_YES_NO = ("yes", "no")


def _pick(rng: Random, candidates: Sequence[int]) -> int | None:
    return rng.choice(candidates) if candidates else None


def _unique(scene: Scene, *attributes: str) -> list[int]:
    """Shapes that no other one has these attributes in common with."""
    values = {i: [getattr(scene.items[i], name) for name in attributes] for i in scene.shapes}
    return [i for i, value in values.items() if list(values.values()).count(value) == 1]


def _name(rng: Random, scene: Scene, index: int) -> str:
    """A noun phrase without article that fits this item alone; the item must be unique as a pair."""
    item = scene.items[index]
    if index in _unique(scene, "shape") and rng.random() < 0.6:
        return item.shape
    return f"{item.color} {item.shape}"


def _color(rng: Random, scene: Scene, want: str) -> Question | None:
    target = _pick(rng, [i for i in _unique(scene, "shape") if want in ("", scene.items[i].color)])
    if target is None:
        return None
    template = rng.choice(("What color is the {}?", "What is the color of the {}?"))
    stem, mentions = stem_of(template, (scene.items[target].shape, (target,)))
    return Question("color", stem, scene.items[target].color, mentions=mentions)


def _shape(rng: Random, scene: Scene, want: str) -> Question | None:
    target = _pick(rng, [i for i in _unique(scene, "color") if want in ("", scene.items[i].shape)])
    if target is None:
        return None
    template = rng.choice(("What shape is the {} object?", "What is the shape of the {} thing?"))
    stem, mentions = stem_of(template, (scene.items[target].color, (target,)))
    return Question("shape", stem, scene.items[target].shape, mentions=mentions)


def _groups(scene: Scene) -> list[tuple[str, tuple[int, ...]]]:
    """Countable groups: (plural noun phrase, items)."""
    groups = [(f"{s}es" if s == "cross" else f"{s}s", lambda it, s=s: it.shape == s) for s in SHAPES]
    groups += [(f"{c} objects", lambda it, c=c: it.color == c) for c in COLORS]
    return [(noun, tuple(i for i in scene.shapes if test(scene.items[i]))) for noun, test in groups]


def _count(rng: Random, scene: Scene, want: str) -> Question | None:
    groups = [g for g in _groups(scene) if (str(len(g[1])) == want if want else 1 <= len(g[1]) <= 5)]
    if not groups:
        return None
    noun, items = rng.choice(groups)
    stem, mentions = stem_of("How many {} are there?", (noun, items))
    return Question("count", stem, str(len(items)), mentions=mentions)


def _relation_of(a: Item, b: Item, relation: str) -> bool | None:
    """Whether a is in ``relation`` to b; None where it is too close to call."""
    axis = 0 if relation in ("left", "right") else 1
    gap = b.center[axis] - a.center[axis]
    if abs(gap) < 10:
        return None
    return (gap > 0) == (relation in ("left", "above"))


_PHRASES = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}


def _relation(rng: Random, scene: Scene, want: str) -> Question | None:
    candidates = _unique(scene, "color", "shape")
    if len(candidates) < 2:
        return None
    first, second = rng.sample(candidates, 2)
    a, b = scene.items[first], scene.items[second]
    named = ((_name(rng, scene, first), (first,)), (_name(rng, scene, second), (second,)))
    if want in _RELATIONS:
        if not _relation_of(a, b, want):
            return None
        horizontal = want in ("left", "right")
        template = "to the left or to the right of" if horizontal else "above or below"
        stem, mentions = stem_of(f"Is the {{}} {template} the {{}}?", *named)
        return Question("relation", stem, want, mentions=mentions)
    relation = rng.choice(_RELATIONS)
    holds = _relation_of(a, b, relation)
    if holds is None or want not in ("", "yes" if holds else "no"):
        return None
    stem, mentions = stem_of(f"Is the {{}} {_PHRASES[relation]} the {{}}?", *named)
    return Question("relation", stem, "yes" if holds else "no", mentions=mentions)


def place_of(item: Item) -> int | None:
    """Index into PLACES; None near a border between cells."""
    cell = SIZE_PX / 3
    x, y = item.center
    if any(abs(v - border) < 3 for v in (x, y) for border in (cell, 2 * cell)):
        return None
    return int(y // cell) * 3 + int(x // cell)


def _where(rng: Random, scene: Scene, want: str) -> Question | None:
    places = {i: place_of(scene.items[i]) for i in _unique(scene, "color", "shape")}
    chosen = [(i, p) for i, p in places.items() if p is not None and want in ("", PLACES[p])]
    if not chosen:
        return None
    target, place = rng.choice(chosen)
    stem, mentions = stem_of("Where in the image is the {}?", (_name(rng, scene, target), (target,)))
    return Question("where", stem, PLACES[place], mentions=mentions)


def _exist(rng: Random, scene: Scene, want: str) -> Question | None:
    present = {(scene.items[i].color, scene.items[i].shape) for i in scene.shapes}
    shapes = {shape for _, shape in present}
    yes = want == "yes" or (want == "" and rng.random() < 0.5)
    if rng.random() < 0.5:
        nouns = [s for s in SHAPES if (s in shapes) == yes]
        if not nouns:
            return None
        noun = rng.choice(nouns)
        items = tuple(i for i in scene.shapes if scene.items[i].shape == noun)
    else:  # an absent pair is made of a present colour and a present shape where there is one
        near = [(c, s) for c, _ in sorted(present) for s in sorted(shapes) if (c, s) not in present]
        pairs = sorted(present) if yes else near
        if not pairs:
            return None
        color, shape = rng.choice(pairs)
        noun = f"{color} {shape}"
        items = tuple(i for i in scene.shapes if (scene.items[i].color, scene.items[i].shape) == (color, shape))
    article = "an" if noun.startswith("orange") else "a"
    stem, mentions = stem_of(f"Is there {article} {{}} in the image?", (noun, items))
    return Question("exist", stem, "yes" if yes else "no", mentions=mentions)


def _attribute(rng: Random, scene: Scene, want: str) -> Question | None:
    yes = want == "yes" or (want == "" and rng.random() < 0.5)
    by_color = rng.random() < 0.6
    target = _pick(rng, _unique(scene, "shape") if by_color else _unique(scene, "color"))
    if target is None:
        return None
    item = scene.items[target]
    truth, noun, values = (item.color, item.shape, COLORS) if by_color else (item.shape, item.color, SHAPES)
    said = truth if yes else rng.choice([v for v in values if v != truth])
    template = f"Is the {{}} {said}?" if by_color else f"Is the {{}} object a {said}?"
    stem, mentions = stem_of(template, (noun, (target,)))
    return Question("attribute", stem, "yes" if yes else "no", mentions=mentions)


def _compare(rng: Random, scene: Scene, want: str) -> Question | None:
    first, second = rng.sample(_groups(scene)[: len(SHAPES)], 2)
    if len(first[1]) == len(second[1]):
        return None
    answer = "yes" if len(first[1]) > len(second[1]) else "no"
    if want not in ("", answer):
        return None
    stem, mentions = stem_of("Are there more {} than {}?", first, second)
    return Question("compare", stem, answer, mentions=mentions)


def _unanswerable(rng: Random, scene: Scene, want: str) -> Question | None:
    if want != "unanswerable":
        question = _color(rng, scene, want) if want in COLORS else _shape(rng, scene, want)
        return question and Question("unanswerable", question.stem, question.answer, mentions=question.mentions)
    by_color = rng.random() < 0.5
    used = {scene.items[i].shape if by_color else scene.items[i].color for i in scene.shapes}
    absent = [v for v in (SHAPES if by_color else COLORS) if v not in used]
    if not absent:
        return None
    template = (
        ("What color is the {}?", "What is the color of the {}?")
        if by_color
        else ("What shape is the {} object?", "What is the shape of the {} thing?")
    )
    stem, mentions = stem_of(rng.choice(template), (rng.choice(absent), ()))
    return Question("unanswerable", stem, want, mentions=mentions)


def _options(rng: Random, truth: str, values: Sequence[str], want: str) -> tuple[tuple[str, ...], str]:
    """Four options with the truth at the wanted letter; the others are drawn from ``values``."""
    letter = want or rng.choice(_LETTERS)
    options = rng.sample([v for v in values if v != truth], 3)
    options.insert(_LETTERS.index(letter), truth)
    return tuple(options), letter


_VALUES: dict[str, tuple[Ask, tuple[str, ...], tuple[str, ...]]] = {
    "color": (_color, COLORS, COLORS_ZH),
    "shape": (_shape, SHAPES, SHAPES_ZH),
    "count": (_count, _COUNTS, _COUNTS),
    "where": (_where, PLACES, PLACES_ZH),
}


def _choice(rng: Random, scene: Scene, want: str) -> Question | None:
    function, values, _ = _VALUES[rng.choice(("color", "shape", "count", "where"))]
    question = function(rng, scene, rng.choice(values))
    if question is None:
        return None
    options, letter = _options(rng, question.answer, values, want)
    return Question("choice", question.stem, letter, options, question.mentions)


def _choice_zh(rng: Random, scene: Scene, want: str) -> Question | None:
    topic = rng.choice(("color", "shape", "count", "where"))
    function, values, values_zh = _VALUES[topic]
    question = function(rng, scene, rng.choice(values))
    if question is None:
        return None
    items = question.mentions[0].items
    first = scene.items[items[0]]
    shape, color = SHAPES_ZH[SHAPES.index(first.shape)], COLORS_ZH[COLORS.index(first.color)]
    if topic == "color":
        template, noun = "图中的{}是什么颜色？", shape
    elif topic == "shape":
        template, noun = "图中{}的物体是什么形状？", color
    elif topic == "count":
        by_color = "objects" in question.stem
        template, noun = ("图中有几个{}的物体？", color) if by_color else ("图中有几个{}？", shape)
    else:
        template, noun = "{}在图中的什么位置？", f"{color}的{shape}"
    stem, mentions = stem_of(template, (noun, items))
    options, letter = _options(rng, values_zh[values.index(question.answer)], values_zh, want)
    return Question("choice_zh", stem, letter, options, mentions)


def _describe(rng: Random, scene: Scene, want: str) -> Question | None:
    order = sorted(scene.shapes, key=lambda i: scene.items[i].center[0])
    centers = [scene.items[i].center[0] for i in order]
    if not 4 <= len(order) <= 5 or any(b - a < 5 for a, b in pairwise(centers)):
        return None
    answer = ", ".join(f"{scene.items[i].color} {scene.items[i].shape}" for i in order)
    return Question("describe", "List all objects from left to right.", answer)


def _with_article(item: Item) -> str:
    return f"{'an' if item.color == 'orange' else 'a'} {item.color} {item.shape}"


def _describe_places(rng: Random, scene: Scene, want: str) -> Question | None:
    """What is in each of the nine places, row by row: a sentence for every place, also the empty ones."""
    found: dict[int, list[Item]] = {place: [] for place in range(len(PLACES))}
    for index in scene.shapes:
        place = place_of(scene.items[index])
        if place is None:
            return None
        found[place].append(scene.items[index])
    sentences = []
    for place, items in found.items():
        items.sort(key=lambda item: item.center[0])
        if any(b.center[0] - a.center[0] < 5 for a, b in pairwise(items)):
            return None
        sentences.append(f"In the {PLACES[place]} there is {' and '.join(map(_with_article, items)) or 'no object'}.")
    return Question("describe_places", "Describe this picture from top left to bottom right.", " ".join(sentences))


@dataclass(frozen=True)
class Family:
    """A skill that is asked for.

    Attributes:
        ask: a question about a scene whose answer is the third argument (``""``: any), or ``None``.
        answers: asked for evenly (repetition is weight); ``""``: open.
        kind: of the scenes.
    """

    ask: Ask
    answers: tuple[str, ...] = ("",)
    kind: SceneKind = "objects"


QUESTION_FAMILIES: dict[str, Family] = {
    "color": Family(_color, COLORS),
    "shape": Family(_shape, SHAPES),
    "count": Family(_count, _COUNTS),
    "relation": Family(_relation, (*_YES_NO, *_YES_NO, *_RELATIONS)),
    "where": Family(_where, PLACES),
    "exist": Family(_exist, _YES_NO),
    "attribute": Family(_attribute, _YES_NO),
    "compare": Family(_compare, _YES_NO),
    "unanswerable": Family(_unanswerable, (*COLORS, *SHAPES, *("unanswerable",) * 8)),
    "choice": Family(_choice, _LETTERS),
    "choice_zh": Family(_choice_zh, _LETTERS),
    "read": Family(ask_read, kind="signs"),
    "ocr": Family(ask_ocr, kind="signs"),
    "chart": Family(ask_chart, tuple("123456789"), "chart"),
    "chart_extreme": Family(ask_chart_extreme, COLORS, "chart"),
    "diagram": Family(ask_diagram, _LETTERS, "diagram"),
    "describe": Family(_describe),
    "describe_places": Family(_describe_places),
}
