"""Samples from scenes and questions: deterministic in (split, seed, family, index) alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from PIL import Image

from dop_search.data.rendered.drawing import draw_scene
from dop_search.data.rendered.formats import FAMILY_BENCHMARKS, LONG_FAMILY_BENCHMARKS, Question, prompt
from dop_search.data.rendered.questions import QUESTION_FAMILIES
from dop_search.data.rendered.scenes import SPLITS, Scene, Split, sample_scene
from dop_search.data.samples import Sample
from dop_search.utils.registry import unknown

FAMILIES: tuple[str, ...] = tuple(FAMILY_BENCHMARKS)
"""The question families, in the order in which ``rendered_samples`` goes round."""

LONG_FAMILIES: tuple[str, ...] = tuple(LONG_FAMILY_BENCHMARKS)
"""Families with answers of 75 tokens and more, asked only if they are named."""

_KNOWN = {**FAMILY_BENCHMARKS, **LONG_FAMILY_BENCHMARKS}


@dataclass(frozen=True)
class RenderedQuestion:
    """A sample before formatting: for whoever writes a benchmark's own rows.

    Attributes:
        id: as in ``Sample``.
        scene: what ``draw_scene`` draws.
        question: bare stem, options and answer.
        benchmark: the format that ``rendered_samples`` uses for it.
    """

    id: str
    scene: Scene
    question: Question
    benchmark: str


def derived_rng(*parts: str | int) -> Random:
    """A generator seeded by the SHA-256 of the parts: the same in every process and on every machine."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return Random(int.from_bytes(digest[:16], "little"))


def rendered_questions(
    split: Split, num_samples: int, seed: int = 0, families: Sequence[str] | None = None
) -> tuple[RenderedQuestion, ...]:
    """Questions with their scenes, families in turn; a longer request starts with the shorter one.

    Raises:
        ValueError: unknown split or family, or ``num_samples < 1``.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, but got {split!r}")
    if num_samples < 1:
        raise ValueError(f"`num_samples >= 1` must hold, but got num_samples={num_samples}")
    chosen = FAMILIES if families is None else tuple(families)
    for family in chosen:
        if family not in _KNOWN:
            raise ValueError(f"families: {unknown('family', family, _KNOWN)}")
    if not chosen:
        raise ValueError(f"families must name at least one of {FAMILIES}, or be None for all")
    return tuple(_question(split, seed, index, chosen[index % len(chosen)]) for index in range(num_samples))


def rendered_samples(
    split: Split, num_samples: int, seed: int = 0, families: Sequence[str] | None = None
) -> tuple[Sample, ...]:
    """Rendered images (96×96) with questions in benchmark formats, families in turn.

    Deterministic in its arguments across processes and machines. Splits share no scene: a scene's content decides
    its split. A sample's content depends on split, seed, position and family, not on ``num_samples``.

    Raises:
        ValueError: unknown split or family, or ``num_samples < 1``.
    """
    return tuple(
        Sample(
            id=rendered.id,
            image=Image.fromarray(draw_scene(rendered.scene)),
            question=prompt(rendered.question, rendered.benchmark),
            answers=(rendered.question.answer,),
            family=rendered.question.family,
        )
        for rendered in rendered_questions(split, num_samples, seed, families)
    )


def _question(split: Split, seed: int, index: int, family: str) -> RenderedQuestion:
    rng = derived_rng("rendered", split, seed, family, index)
    kind = QUESTION_FAMILIES[family]
    want = rng.choice(kind.answers)
    benchmark = rng.choice(_KNOWN[family])
    while True:
        scene = sample_scene(rng, kind.kind, split)
        question = kind.ask(rng, scene, want)
        if question is not None:
            return RenderedQuestion(f"pocket/{split}/{seed}/{index:06d}", scene, question, benchmark)
