"""Scenes and questions as SmolLM2's tokens, by stage of its training: what ``see.py`` and ``tower.py`` learn from."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from dop_search.data.rendered.drawing import draw_scene, draw_scene_with_ids
from dop_search.data.rendered.formats import FAMILY_BENCHMARKS, prompt
from dop_search.data.rendered.questions import PLACES, QUESTION_FAMILIES, place_of
from dop_search.data.rendered.scenes import COLORS, SHAPES, Scene, sample_scene
from dop_search.models.smollm2 import smollm2_path
from experiments.pocket.shards import GRID, patch_labels

FEW = {"color": 4, "shape": 4, "attribute": 1, "exist": 1}
FAMILIES = {
    **{"color": 2, "shape": 2, "unanswerable": 2, "attribute": 3, "exist": 3},
    **{"where": 2, "relation": 3, "count": 1, "compare": 1},
}
"""Questions of a scene, by family, from stage 3 on; before, ``FEW``."""
VALUES = (*COLORS, *SHAPES)
BACKGROUND = " ."
PREFIX = "<|im_start|>A picture:"


class Words:
    """Scenes and questions as token ids."""

    def __init__(self) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(smollm2_path())
        self.word = {w: self.ids(f" {w}")[0] for w in VALUES}
        self.prefix = self.ids(PREFIX)
        self.background = self.ids(BACKGROUND)[0]

    def ids(self, text: str) -> list[int]:
        """Of a text, without special tokens."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def caption(self, rng: Random, scene: Scene) -> list[tuple[int, int]]:
        """Position and word: the objects' colours and shapes, in random order."""
        items = [scene.items[i] for i in scene.shapes]
        rng.shuffle(items)
        return list(enumerate(self.word[w] for item in items for w in (item.color, item.shape)))

    def patches(self, rng: Random, scene: Scene, share: float) -> list[tuple[int, int]]:
        """Position and word of the patches in raster order; of the background's, a random share."""
        ids = [self.word[word] for word in VALUES]
        found = []
        for index, word in enumerate(patch_words(scene).tolist()):
            if word < len(VALUES):
                found.append((index, ids[word]))
            elif rng.random() < share:
                found.append((index, self.background))
        return found

    def questions(self, rng: Random, scene: Scene, stage: int) -> list[tuple[str, str, str]]:
        """Family, question (in stage 4 in a benchmark's format), answer."""
        asked: dict[str, tuple[str, str, str]] = {}
        for family, number in (FEW if stage < 3 else FAMILIES).items():
            for _ in range(number):
                kind = QUESTION_FAMILIES[family]
                question = kind.ask(rng, scene, "" if family in ("color", "shape") else rng.choice(kind.answers))
                if question is not None:
                    form = prompt(question, rng.choice(FAMILY_BENCHMARKS[family])) if stage == 4 else question.stem
                    asked[question.stem] = (family, form, question.answer)
        return list(asked.values())

    def row(self, context: list[tuple[int, int]], asked: list[tuple[str, str, str]], listing: str) -> dict[str, Any]:
        """Ids, positions, segments and labels (-100: none) of a scene with questions that do not see each other."""
        start = len(self.prefix)
        ids = [*self.prefix, *(w for _, w in context)]
        positions = [*range(start), *(start + p for p, _ in context)]
        segments, labels, first = [0] * len(ids), [-100] * len(ids), []
        after = start + (GRID * GRID if context and max(p for p, _ in context) > 20 else len(context))
        texts = [(f"\nQuestion: {stem} Answer:", f" {answer}") for _, stem, answer in asked]
        texts += [("\nObjects:", listing)] if listing else []
        for number, (question, answer) in enumerate(texts, 1):
            q, a = self.ids(question), [*self.ids(answer), self.tokenizer.eos_token_id]
            first.append(len(ids) + len(q) - 1)
            labels += [-100] * (len(q) - 1) + a + [-100]
            ids += [*q, *a]
            positions += range(after, after + len(q) + len(a))
            segments += [number] * (len(q) + len(a))
        segment = torch.tensor(segments)
        allowed = (segment[:, None] == segment) | (segment == 0)[None, :]
        return {
            "input_ids": torch.tensor([ids]),
            "position_ids": torch.tensor([positions]),
            "mask": (allowed & torch.ones_like(allowed).tril())[None, None],
            "labels": torch.tensor(labels),
            "first": first,
            "image": slice(start, start + GRID * GRID),
        }


def make_row(words: Words, rng: Random, stage: int, share: float, split: Any) -> dict[str, Any]:
    """A random scene of a stage with its questions."""
    scene = sample_scene(rng, "objects", split)
    items = [scene.items[i] for i in scene.shapes]
    asked = words.questions(rng, scene, stage)
    if stage == 1:
        context = words.caption(rng, scene)
    elif stage == 4:  # the tower's words take their place
        context = [(index, words.background) for index in range(GRID * GRID)]
    else:
        context = words.patches(rng, scene, share)
        items.sort(key=lambda item: (item.y, item.x))
    places = ["" if stage < 3 or (p := place_of(item)) is None else f" {PLACES[p]}" for item in items]
    named = [f" {item.color} {item.shape}{place}" for item, place in zip(items, places, strict=True)]
    listing = ",".join(named) if stage in (2, 3) and split == "train" else ""
    row = {**words.row(context, asked, listing), "asked": asked}
    return {**row, "pixels": pixels(scene)} if stage == 4 else row


def patch_words(scene: Scene) -> Tensor:
    """[256]: which of ``VALUES`` stands for each patch, colours in even columns, shapes in odd ones; after the last:
    background."""
    labels = torch.from_numpy(patch_labels(scene, draw_scene_with_ids(scene)[1])).long()
    odd = torch.arange(len(labels)) % 2 == 1
    word = torch.where(odd, len(COLORS) + labels[:, 0] - 1, labels[:, 1] - 1)
    return torch.where(labels[:, 0] == 0, len(VALUES), word)


def pixels(scene: Scene) -> Tensor:
    """[3, 96, 96] in −1 to 1, as the image processor gives them."""
    return torch.from_numpy(np.ascontiguousarray(draw_scene(scene))).permute(2, 0, 1) / 127.5 - 1
