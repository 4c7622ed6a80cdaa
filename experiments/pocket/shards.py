"""Training data: rendered scenes with several packed questions each, written as NumPy shards by worker processes.

One row is one scene: image, per-patch labels for the vision tower, and up to ``MAX_QUESTIONS`` questions one after
another. A question sees the prefix, the image and itself (``segment``); its positions continue after the image.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from dop_search.data.rendered.drawing import draw_scene_with_ids
from dop_search.data.rendered.formats import FAMILY_BENCHMARKS, LONG_FAMILY_BENCHMARKS, Question, prompt
from dop_search.data.rendered.glyphs import CHARACTERS
from dop_search.data.rendered.questions import QUESTION_FAMILIES
from dop_search.data.rendered.sampling import FAMILIES, LONG_FAMILIES, derived_rng
from dop_search.data.rendered.scenes import COLORS, SHAPES, SIZE_PX, Item, Scene, SceneKind, Split, sample_scene

PATCH_PX = 6
GRID = SIZE_PX // PATCH_PX
"""Patches per side: 16 × 16 = 256 visual tokens, so that text is a tenth of the sequence and small budgets exist."""
PREFIX = "A chat about a picture. USER:"
TEXT_LENGTH = 247  # with prefix and image 512, a multiple of 16, which attention kernels like
MAX_QUESTIONS = 10
PATCH_CLASSES = {
    **{"shape": 12, "color": 9, "character": 37, "value": 10, "link": 9},
    **{"row": 13, "column": 13, "size": 6, "slot": 5},
}
"""What a patch shows (0: nothing): among others row and column of its item's centre in 8 px bins, its size, and for
text which character of the sign it is."""
NUM_PRESENCE = len(SHAPES) * len(COLORS) + len(CHARACTERS)
MIDDLE_CLASSES = (6, 6, 8, 8, 9, 4)
"""Tap at a noun: row, column (16 px bins), colour, shape of its item; number of items it names. At an option's last
word: its letter."""
LATE_CLASSES = (6, 6, 8, 8, 9, 3, 3)
"""Tap at the last prompt token: the same for the first noun, and the signs of Δx and Δy to the second."""

KIND_WEIGHTS: dict[SceneKind, float] = {"objects": 0.56, "signs": 0.16, "chart": 0.14, "diagram": 0.14}
FAMILY_WEIGHTS: dict[str, float] = {
    **{"count": 1.5, "relation": 1.5, "compare": 1.5, "choice": 2.5, "choice_zh": 2.5},
    **{"color": 2.0, "shape": 3.0, "chart_extreme": 4.0, "chart": 2.0, "ocr": 2.0, "describe": 4.0},
}
"""How often a family is tried; the rarer ones fail more often to find their answer in a scene."""

SHARD_FAMILIES = (*FAMILIES, *LONG_FAMILIES)
"""What the index in a row's ``family`` means."""
LONG_SHARE = 0.8
"""With ``--long-answers``: how many of the scenes are of a kind that has one, and begin with it."""

Row = dict[str, NDArray[np.generic]]


def make_row(tokenizer: Tokenizer, split: Split, seed: int, index: int, long_answers: bool = False) -> Row:
    """One scene with its questions; deterministic in its arguments."""
    rng = derived_rng("shards", split, seed, index)
    first: Question | None = None
    if long_answers and rng.random() < LONG_SHARE:
        family = rng.choice(LONG_FAMILIES)
        kind = QUESTION_FAMILIES[family].kind
        while first is None:
            scene = sample_scene(rng, kind, split)
            first = QUESTION_FAMILIES[family].ask(rng, scene, rng.choice(QUESTION_FAMILIES[family].answers))
    else:
        kind = rng.choices(tuple(KIND_WEIGHTS), tuple(KIND_WEIGHTS.values()))[0]
        scene = sample_scene(rng, kind, split)
    families = [f for f in FAMILIES if QUESTION_FAMILIES[f].kind == kind]
    weights = [FAMILY_WEIGHTS.get(f, 1.0) for f in families]
    image, ids = draw_scene_with_ids(scene)
    row = _empty_row()
    row["image"] = image
    row["patches"] = patch_labels(scene, ids)
    row["presence"] = _presence(scene)
    length, segment, seen = 0, 0, set()
    if first is not None:
        text = prompt(first, rng.choice(LONG_FAMILY_BENCHMARKS[first.family]))
        length, segment = _append(row, tokenizer, scene, first, text, 0, 1), 1
    for _ in range(4 * MAX_QUESTIONS):
        family = rng.choices(families, weights)[0]
        question = QUESTION_FAMILIES[family].ask(rng, scene, rng.choice(QUESTION_FAMILIES[family].answers))
        if question is None or (question.stem, question.options) in seen:
            continue
        text = prompt(question, rng.choice(FAMILY_BENCHMARKS[family]))
        used = _append(row, tokenizer, scene, question, text, length, segment + 1)
        if used == 0 or segment + 1 == MAX_QUESTIONS:
            break
        seen.add((question.stem, question.options))
        length, segment = length + used, segment + 1
    return row


def write_shards(
    tokenizer_dir: Path,
    directory: Path,
    split: Split,
    seed: int,
    num_shards: int,
    rows_per_shard: int,
    workers: int,
    long_answers: bool,
) -> None:
    """Write ``num_shards`` shards (existing ones are kept) with a pool of processes."""
    directory.mkdir(parents=True, exist_ok=True)
    jobs = [
        (
            tokenizer_dir,
            directory / f"{split}-{seed}-{i:05d}.npz",
            *(split, seed, i * rows_per_shard, rows_per_shard, long_answers),
        )
        for i in range(num_shards)
    ]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for _ in pool.imap_unordered(_write_shard, jobs, chunksize=1):
            pass


def _write_shard(job: tuple[Path, Path, Split, int, int, int, bool]) -> None:
    tokenizer_dir, path, split, seed, first, count, long_answers = job
    if path.exists():
        return
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    rows = [make_row(tokenizer, split, seed, first + i, long_answers) for i in range(count)]
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, **{name: np.stack([row[name] for row in rows]) for name in rows[0]})
    os.replace(partial, path)


def _empty_row() -> Row:
    return {
        "tokens": np.zeros(TEXT_LENGTH, dtype=np.int16),
        "segment": np.zeros(TEXT_LENGTH, dtype=np.int8),
        "position": np.zeros(TEXT_LENGTH, dtype=np.int16),
        "answer": np.zeros(TEXT_LENGTH, dtype=np.int8),
        "family": np.zeros(TEXT_LENGTH, dtype=np.int8),
        "middle": np.full((TEXT_LENGTH, len(MIDDLE_CLASSES)), -1, dtype=np.int8),
        "late": np.full((TEXT_LENGTH, len(LATE_CLASSES)), -1, dtype=np.int8),
    }


def _append(
    row: Row,
    tokenizer: Tokenizer,
    scene: Scene,
    question: Question,
    text: str,
    start: int,
    segment: int,
) -> int:
    """Write a question at ``start``; returns its number of tokens, 0 if it does not fit."""
    encoded = tokenizer.encode(f"{text} ASSISTANT:", add_special_tokens=False)
    answer = [*tokenizer.encode(question.answer, add_special_tokens=False).ids, tokenizer.token_to_id("</s>")]
    num_prompt, total = len(encoded.ids), len(encoded.ids) + len(answer)
    if start + total > TEXT_LENGTH:
        return 0
    span = slice(start, start + total)
    row["tokens"][span] = [*encoded.ids, *answer]
    row["segment"][span] = segment
    row["position"][span] = np.arange(total)
    row["answer"][start + num_prompt : start + total] = 1
    row["family"][span] = SHARD_FAMILIES.index(question.family)
    stem_start = text.lower().index(question.stem.lower())
    for mention in question.mentions:
        end = stem_start + mention.end
        token = next(i for i, (_, stop) in enumerate(encoded.offsets) if stop >= end)
        row["middle"][start + token, :5] = _item_labels(scene, mention.items)
    for letter, option in enumerate(question.options):
        line = f"{'ABCD'[letter]}. {option}\n"
        end = text.index(line) + len(line) - 1
        token = next(i for i, (_, stop) in enumerate(encoded.offsets) if stop >= end)
        row["middle"][start + token, 5] = letter
    if question.mentions:
        last = start + num_prompt - 1
        row["late"][last, :5] = _item_labels(scene, question.mentions[0].items)
        if len(question.mentions) == 2 and all(len(m.items) == 1 for m in question.mentions):
            a, b = (scene.items[m.items[0]].center for m in question.mentions)
            row["late"][last, 5:] = [1 + (b[k] - a[k] >= 10) - (b[k] - a[k] <= -10) for k in (0, 1)]
    return total


def _item_labels(scene: Scene, items: tuple[int, ...]) -> list[int]:
    """Row, column, colour and shape where one item is meant; -1: no label."""
    labels = [-1, -1, -1, -1, min(len(items), 8)]
    if len(items) == 1:
        item = scene.items[items[0]]
        x, y = item.center
        labels[:2] = [min(int(y) // 16, 5), min(int(x) // 16, 5)]
        labels[2] = COLORS.index(item.color) if item.color else -1
        labels[3] = SHAPES.index(item.shape) if item.shape else -1
    return labels


def _presence(scene: Scene) -> NDArray[np.int8]:
    """Which (shape, colour) pairs and which characters are in the scene."""
    present = np.zeros(NUM_PRESENCE, dtype=np.int8)
    for item in scene.items:
        if item.kind == "shape":
            present[SHAPES.index(item.shape) * len(COLORS) + COLORS.index(item.color)] = 1
        elif item.kind in ("sign", "label"):
            for character in item.text:
                present[len(SHAPES) * len(COLORS) + CHARACTERS.index(character)] = 1
    return present


def patch_labels(scene: Scene, ids: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Per patch [patches, 9]: the classes of ``PATCH_CLASSES`` of the item that covers most of it; 0: none."""
    labels = np.zeros((GRID * GRID, len(PATCH_CLASSES)), dtype=np.int8)
    patches = _by_patch(ids)
    counts = np.stack([(patches == i + 1).sum(axis=1) for i in range(len(scene.items))])
    owner, covered = counts.argmax(axis=0), 6 * counts.max(axis=0) >= PATCH_PX * PATCH_PX
    table = np.array([_item_classes(scene, item) for item in scene.items], dtype=np.int8)
    labels[covered] = table[owner[covered]]
    characters, slots = np.zeros((2, SIZE_PX, SIZE_PX), dtype=np.uint8)
    for item in scene.items:
        if item.kind == "sign":
            pitch = (item.width - 6) // len(item.text)
            for i, character in enumerate(item.text):
                x = item.x + 4 + i * pitch
                box = slice(item.y + 3, item.y + item.height - 3), slice(x, x + pitch - 2)
                characters[box] = 1 + CHARACTERS.index(character)
                slots[box] = 1 + i
    if characters.any():
        names = list(PATCH_CLASSES)
        for column, values in ((names.index("character"), characters), (names.index("slot"), slots)):
            cells = _by_patch(values)
            present = [int(c) for c in np.unique(cells) if c]
            area = np.stack([(cells == c).sum(axis=1) for c in present])
            best, enough = area.argmax(axis=0), 4 * area.max(axis=0) >= PATCH_PX * PATCH_PX
            labels[enough, column] = np.array(present, dtype=np.int8)[best[enough]]
    return labels


def _by_patch(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[96, 96] → [patches, pixels of a patch]."""
    return values.reshape(GRID, PATCH_PX, GRID, PATCH_PX).transpose(0, 2, 1, 3).reshape(GRID * GRID, -1)


def _item_classes(scene: Scene, item: Item) -> list[int]:
    """The classes of one item; labels and what they point to share theirs."""
    target = scene.items[item.target] if item.target >= 0 else item
    kind = {"sign": 9, "bar": 10, "label": 11}.get(item.kind, 0)
    text = item.text
    if item.kind == "shape":
        index = scene.items.index(item)
        text = next((i.text for i in scene.items if i.kind == "label" and i.target == index), "")
    return [
        1 + SHAPES.index(item.shape) if item.kind == "shape" else kind,
        1 + COLORS.index(target.color) if target.color else 0,
        1 + CHARACTERS.index(text) if len(text) == 1 else 0,
        target.value,
        1 + SHAPES.index(target.shape) if item.kind == "label" and target.shape else 0,
        1 + int(item.center[1]) // 8,
        1 + int(item.center[0]) // 8,
        1 + min((item.width - 10) // 4, 4) if item.kind == "shape" else 0,
        0,
    ]


def main() -> None:
    """Command line: write the training and the search-split shards."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory with tokenizer.json")
    parser.add_argument("--data", type=Path, required=True, help="directory for the shards")
    parser.add_argument("--num-scenes", type=int, default=250_000)
    parser.add_argument("--rows-per-shard", type=int, default=512)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--long-answers", action="store_true", help="most scenes with a question of a long answer")
    args = parser.parse_args()
    num_shards = -(-args.num_scenes // args.rows_per_shard)
    for split, count in (("search", min(2, num_shards)), ("train", num_shards)):
        write_shards(
            args.tokenizer, args.data, split, args.seed, count, args.rows_per_shard, args.workers, args.long_answers
        )


if __name__ == "__main__":
    main()
