"""Samples without images: stories by templates, and the documentation and licences of packages that are installed."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import files
from itertools import islice

import numpy as np

from dop_search.data.disjoint import split_of
from dop_search.data.passages.stories import story
from dop_search.data.rendered.sampling import derived_rng
from dop_search.data.samples import Sample, with_context
from dop_search.utils.errors import DataError

PASSAGE_FAMILIES = ("question", "summary", "continuation")
"""What is asked about a passage, in turn."""

_KINDS = ("story", "documentation", "licence")
_PACKAGES = ("numpy", "torch", "torchvision", "transformers", "pillow", "packaging", "safetensors")
_DOCUMENTED = ("numpy", "numpy.linalg", "numpy.fft", "torch", "torch.nn", "torch.linalg", "torch.optim")
_SHORTEST, _LONGEST = 70, 150
"""Words of a passage from a package."""
_NUM_SPLITS = 3
_ASKED = {
    ("documentation", "question"): "What is this for? Answer in one sentence.",
    ("licence", "question"): "What does this text allow or demand? Answer in one sentence.",
    "summary": "Summarise the text in one sentence.",
    "continuation": "Continue the text with one more sentence.",
}


def passage_samples(
    split: int, num_samples: int, seed: int = 0, families: Sequence[str] | None = None
) -> tuple[Sample, ...]:
    """Passages with a question, a request for a summary, or one for a continuation; kinds of passage in turn.

    A passage's content decides which split may use it. There are no answers: the model's own are taken.

    Raises:
        DataError: on an unknown family, or if there are not so many passages.
    """
    chosen = PASSAGE_FAMILIES if families is None else tuple(families)
    if unknown := sorted(set(chosen) - set(PASSAGE_FAMILIES)):
        raise DataError(f"passages have no families {unknown}; they have {list(PASSAGE_FAMILIES)}")
    drawn = {kind: _drawn(kind, split, seed) for kind in _KINDS}
    samples = []
    for index in range(num_samples):
        kind, family = _KINDS[index % len(_KINDS)], chosen[index // len(_KINDS) % len(chosen)]
        found = next(drawn[kind], None)
        if found is None:
            raise DataError(
                f"there are {index} passages for this split, but {num_samples} are asked for (the installed packages "
                "have no more); lower data.num_samples, data.num_heldout and data.num_test"
            )
        passage, question = found
        asked = question if family == "question" else _ASKED[family]
        name = f"passages/{split}/{seed}/{index:06d}-{kind}"
        samples.append(Sample(name, None, with_context(passage, asked), (), family))
    return tuple(samples)


def _drawn(kind: str, split: int, seed: int) -> Iterator[tuple[str, str]]:
    for passage, question in _stories(seed) if kind == "story" else _installed(kind, seed):
        if split_of(passage.encode(), _NUM_SPLITS) == split:
            yield passage, question


def _stories(seed: int) -> Iterator[tuple[str, str]]:
    rng = derived_rng("passages", seed)
    while True:
        yield story(rng)


def _installed(kind: str, seed: int) -> Iterator[tuple[str, str]]:
    texts = _documentation() if kind == "documentation" else _licences()
    for index in np.random.default_rng(seed).permutation(len(texts)):
        yield texts[index], _ASKED[kind, "question"]


@cache
def _documentation() -> tuple[str, ...]:
    """How the docstrings of numpy and torch begin."""
    found: dict[str, str] = {}
    for name in _DOCUMENTED:
        module = importlib.import_module(name)
        for item in sorted(vars(module)):
            text = inspect.getdoc(getattr(module, item)) if item[0] != "_" and callable(getattr(module, item)) else None
            found |= {_start(piece): piece for piece in islice(_cut(text or ""), 1)}
    return tuple(found.values())


@cache
def _licences() -> tuple[str, ...]:
    """The licences of the packages that this one needs, in pieces."""
    found: dict[str, str] = {}
    for package in _PACKAGES:
        for path in sorted(files(package) or (), key=str):
            if re.search(r"dist-info/.*(LICEN[CS]E|NOTICE|COPYING)", str(path)):
                found |= {_start(piece): piece for piece in _cut(path.read_text(encoding="utf-8"))}
    return tuple(found.values())


def _start(text: str) -> str:
    """The first letters: licences differ in names alone, and must not be in two splits for that."""
    return "".join(filter(str.isalpha, text.lower()))[:40]


def _cut(text: str) -> Iterator[str]:
    """Pieces of whole paragraphs, within the lengths."""
    piece: list[str] = []
    for paragraph in (*re.split(r"\n\s*\n", text), ""):
        words = paragraph.split()
        if piece and (not words or len(piece) + len(words) > _LONGEST):
            if len(piece) >= _SHORTEST:
                yield " ".join(piece[:_LONGEST])
            piece = []
        piece += words
