"""Scenes: what is in an image, before it is drawn.

A scene belongs to one split by its content alone (a hash of its items), so that no scene of one split can ever
appear in another, whatever the seeds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

from dop_search.data.rendered.glyphs import CHARACTERS

Split = Literal["train", "search", "heldout", "test"]
SceneKind = Literal["objects", "signs", "chart", "diagram"]
ItemKind = Literal["shape", "sign", "bar", "label"]

SPLITS: tuple[Split, ...] = get_args(Split)
SIZE_PX = 96
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "moon")
COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")

LETTERS = tuple(c for c in CHARACTERS if c.isalpha())
_VOWELS = tuple("AEIOU")
_CONSONANTS = tuple(c for c in LETTERS if c not in _VOWELS)
_SPLIT_OF_BUCKET: tuple[Split, ...] = ("train", "train", "train", "train", "train", "search", "heldout", "test")


@dataclass(frozen=True)
class Item:
    """One thing in a scene; ``x, y`` is the top-left corner of its box, all in pixels.

    ``text`` is what a sign or label says, ``value`` the height of a bar in units, ``target`` the index of the
    item that a label's arrow points to (-1: none).
    """

    kind: ItemKind
    x: int
    y: int
    width: int
    height: int
    color: str = ""
    shape: str = ""
    text: str = ""
    value: int = 0
    target: int = -1

    @property
    def center(self) -> tuple[float, float]:
        """Centre (x, y) of the box."""
        return self.x + self.width / 2, self.y + self.height / 2


@dataclass(frozen=True)
class Scene:
    """Items plus ``style``, the seed of background, clutter and colour jitter."""

    kind: SceneKind
    items: tuple[Item, ...]
    style: int

    @property
    def shapes(self) -> tuple[int, ...]:
        """Indices of the items that are shapes."""
        return tuple(i for i, item in enumerate(self.items) if item.kind == "shape")


def split_of(scene: Scene) -> Split:
    """The split a scene belongs to: a hash of its items (five eighths train, one eighth each of the others)."""
    content = ";".join(
        f"{i.kind},{i.x},{i.y},{i.width},{i.height},{i.color},{i.shape},{i.text},{i.value},{i.target}"
        for i in scene.items
    )
    return _SPLIT_OF_BUCKET[hashlib.sha256(content.encode()).digest()[0] % 8]


def sample_scene(rng: Random, kind: SceneKind, split: Split) -> Scene:
    """A random scene of ``kind`` that belongs to ``split``."""
    while True:
        scene = Scene(kind, tuple(_SAMPLERS[kind](rng)), rng.getrandbits(32))
        if split_of(scene) == split:
            return scene


def _place(rng: Random, boxes: list[Item], width: int, height: int, margin: int = 2) -> tuple[int, int] | None:
    """A free top-left corner for a box, or None after 40 tries."""
    for _ in range(40):
        x, y = int(rng.random() * (SIZE_PX - width - 1)) + 1, int(rng.random() * (SIZE_PX - height - 1)) + 1
        if not any(
            x < b.x + b.width + margin
            and b.x < x + width + margin
            and y < b.y + b.height + margin
            and b.y < y + height + margin
            for b in boxes
        ):
            return x, y
    return None


def _shape(rng: Random, boxes: list[Item], shape: str, color: str, sizes: tuple[int, int]) -> Item | None:
    size = rng.randint(*sizes)
    corner = _place(rng, boxes, size, size)
    if corner is None:
        return None
    return Item("shape", corner[0], corner[1], size, size, color=color, shape=shape)


def _objects(rng: Random) -> list[Item]:
    num_items = rng.randint(4, 8)
    shapes = [rng.choice(SHAPES) for _ in range(num_items)]
    colors = [rng.choice(COLORS) for _ in range(num_items)]
    if rng.random() < 0.5:  # a repeated shape or colour: something to count
        attribute, values = rng.choice(((shapes, SHAPES), (colors, COLORS)))
        repeated = rng.choice(values)
        for i in range(min(rng.randint(2, 5), num_items)):
            attribute[i] = repeated
    items: list[Item] = []
    for shape, color in zip(shapes, colors, strict=True):
        item = _shape(rng, items, shape, color, (11, 18) if rng.random() < 0.6 else (16, 27))
        if item is not None:
            items.append(item)
    rng.shuffle(items)
    return items


def _word(rng: Random) -> str:
    start = rng.random() < 0.7
    letters = [rng.choice(_CONSONANTS if (i % 2 == 0) == start else _VOWELS) for i in range(rng.choice((3, 3, 4)))]
    return "".join(letters)


def _signs(rng: Random) -> list[Item]:
    items: list[Item] = []
    for color in rng.sample(COLORS, rng.choice((1, 2, 2, 3))):
        digits = rng.random() < 0.4
        text = str(rng.randint(10, 9999)) if digits else _word(rng)
        height = rng.randint(12, 17)
        glyph = (height * 3) // 4
        corner = _place(rng, items, len(text) * (glyph + 2) + 6, height + 6, margin=1)
        if corner is not None:
            width = len(text) * (glyph + 2) + 6
            items.append(Item("sign", corner[0], corner[1], width, height + 6, color=color, text=text))
    for _ in range(rng.randint(1, 3)):
        item = _shape(rng, items, rng.choice(SHAPES), rng.choice(COLORS), (11, 18))
        if item is not None:
            items.append(item)
    return items


def _chart(rng: Random) -> list[Item]:
    num_bars = rng.randint(3, 5)
    unit, base = rng.choice((7, 8)), rng.randint(77, 80)
    width = rng.randint(10, 13)
    gap = rng.randint(3, (84 - num_bars * width) // num_bars)
    left = rng.randint(8, 94 - num_bars * (width + gap))
    letters, colors = rng.sample(LETTERS, num_bars), rng.sample(COLORS, num_bars)
    values = [rng.randint(1, 9) for _ in range(num_bars)]
    items: list[Item] = []
    for i, (letter, color, value) in enumerate(zip(letters, colors, values, strict=True)):
        x, height = left + i * (width + gap), value * unit
        items.append(Item("bar", x, base - height, width, height, color=color, text=letter, value=value))
    for i, letter in enumerate(letters):
        items.append(Item("label", items[i].x + (width - 9) // 2, base + 3, 9, 12, text=letter, target=i))
    return items


_OFFSETS = ((0, -1), (1, -1), (1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1))


def _diagram(rng: Random) -> list[Item]:
    num_parts = rng.randint(3, 5)
    parts: list[Item] = []
    labels: list[Item] = []
    letters = rng.sample(LETTERS, num_parts)
    for shape, letter in zip(rng.sample(SHAPES, num_parts), letters, strict=True):
        for _ in range(12):
            part = _shape(rng, parts + labels, shape, rng.choice(COLORS), (13, 22))
            if part is None:
                continue
            (dx, dy), reach = rng.choice(_OFFSETS), part.width // 2 + rng.randint(13, 18)
            x = int(part.center[0] + dx * reach) - 5
            y = int(part.center[1] + dy * reach) - 6
            box = Item("label", x, y, 10, 13, text=letter, target=len(parts))
            inside = 1 <= x < SIZE_PX - 10 and 1 <= y < SIZE_PX - 13
            if inside and not any(_overlap(box, other) for other in [*parts, *labels, part]):
                parts.append(part)
                labels.append(box)
                break
    return [*parts, *labels]


def _overlap(a: Item, b: Item) -> bool:
    return a.x < b.x + b.width + 1 and b.x < a.x + a.width + 1 and a.y < b.y + b.height + 1 and b.y < a.y + a.height + 1


_SAMPLERS: dict[SceneKind, Callable[[Random], list[Item]]] = {
    "objects": _objects,
    "signs": _signs,
    "chart": _chart,
    "diagram": _diagram,
}
