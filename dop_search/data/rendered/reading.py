"""Question families over text, charts and diagrams."""

from __future__ import annotations

from random import Random

from dop_search.data.rendered.formats import Question, stem_of
from dop_search.data.rendered.scenes import LETTERS, SHAPES, Scene


def _signs(scene: Scene) -> list[int]:
    return [i for i, item in enumerate(scene.items) if item.kind == "sign"]


def ask_read(rng: Random, scene: Scene, want: str) -> Question | None:
    """What one sign says (TextVQA); the answer is the text as it is drawn, in capitals or digits."""
    signs = _signs(scene)
    target = rng.choice(signs)
    item = scene.items[target]
    template = rng.choice(("What is written on the {}?", "What does the {} say?"))
    noun = f"{item.color} sign" if len(signs) > 1 or rng.random() < 0.5 else "sign"
    stem, mentions = stem_of(template, (noun, (target,)))
    return Question("read", stem, item.text, mentions=mentions)


def ask_ocr(rng: Random, scene: Scene, want: str) -> Question | None:
    """The only number or word in the image (OCRBench)."""
    signs = _signs(scene)
    noun = rng.choice(("number", "word"))
    chosen = [i for i in signs if scene.items[i].text.isdigit() == (noun == "number")]
    if len(chosen) != 1:
        return None
    template = f"{'what' if rng.random() < 0.5 else 'What'} is the {{}} in the image?"
    stem, mentions = stem_of(template, (noun, (chosen[0],)))
    return Question("ocr", stem, scene.items[chosen[0]].text, mentions=mentions)


def _bars(scene: Scene) -> list[int]:
    return [i for i, item in enumerate(scene.items) if item.kind == "bar"]


def ask_chart(rng: Random, scene: Scene, want: str) -> Question | None:
    """The value of one bar, named by its colour or its letter (ChartQA)."""
    chosen = [i for i in _bars(scene) if want in ("", str(scene.items[i].value))]
    if not chosen:
        return None
    target = rng.choice(chosen)
    item = scene.items[target]
    noun = f"{item.color} bar" if rng.random() < 0.5 else item.text
    stem, mentions = stem_of(f"What is the value of {'the ' if noun != item.text else ''}{{}}?", (noun, (target,)))
    return Question("chart", stem, str(item.value), mentions=mentions)


def ask_chart_extreme(rng: Random, scene: Scene, want: str) -> Question | None:
    """Which bar is the highest or lowest (ChartQA), by colour."""
    bars = _bars(scene)
    highest = rng.random() < 0.5
    values = [scene.items[i].value for i in bars]
    extreme = max(values) if highest else min(values)
    if values.count(extreme) != 1:
        return None
    target = bars[values.index(extreme)]
    item = scene.items[target]
    if want not in ("", item.color):
        return None
    noun = f"{'highest' if highest else 'lowest'} bar"
    stem, mentions = stem_of("What is the color of the {}?", (noun, (target,)))
    return Question("chart_extreme", stem, item.color, mentions=mentions)


def ask_diagram(rng: Random, scene: Scene, want: str) -> Question | None:
    """Which letter labels a part, or which part a letter points to (AI2D), with four options."""
    labels = [i for i, item in enumerate(scene.items) if item.kind == "label"]
    if len(labels) < 3:
        return None
    label = rng.choice(labels)
    letter, part = scene.items[label].text, scene.items[scene.items[label].target].shape
    shapes, letters = [scene.items[scene.items[i].target].shape for i in labels], [scene.items[i].text for i in labels]
    values: tuple[str, ...]
    if rng.random() < 0.5:
        template, noun, truth, near, values = "What does the letter {} point to?", letter, part, shapes, SHAPES
    else:
        template, noun, truth, near, values = "Which letter points to the {}?", part, letter, letters, LETTERS
    others = [v for v in near if v != truth]
    rng.shuffle(others)
    spare = [v for v in values if v not in near]
    rng.shuffle(spare)
    options = (others + spare)[:3]
    rng.shuffle(options)
    position = "ABCD".index(want) if want else rng.randrange(4)
    options.insert(position, truth)
    stem, mentions = stem_of(template, (noun, (scene.items[label].target,)))
    return Question("diagram", stem, "ABCD"[position], tuple(options), mentions)
