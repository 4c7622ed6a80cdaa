"""How the benchmarks of the field phrase a question, so that one question can be asked in each one's format."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mention:
    """Where a question's stem names items: the noun ends before character ``end``; ``items`` are their indices."""

    end: int
    items: tuple[int, ...]


def stem_of(template: str, *named: tuple[str, tuple[int, ...]]) -> tuple[str, tuple[Mention, ...]]:
    """Fill ``{}`` slots with nouns in order, and note where each ends and which items it names."""
    pieces = template.split("{}")
    text, mentions = pieces[0], []
    for (noun, items), rest in zip(named, pieces[1:], strict=True):
        text += noun
        mentions.append(Mention(len(text), items))
        text += rest
    return text, tuple(mentions)


@dataclass(frozen=True)
class Question:
    """A question about a scene, before a benchmark's format is applied.

    Attributes:
        family: skill, e.g. ``"count"``.
        stem: the bare question.
        answer: canonical answer; for a question with options, the letter.
        options: option texts (A, B, …); empty for an open question.
        mentions: what the stem's nouns refer to, in order.
    """

    family: str
    stem: str
    answer: str
    options: tuple[str, ...] = ()
    mentions: tuple[Mention, ...] = ()


FAMILY_BENCHMARKS: dict[str, tuple[str, ...]] = {
    "color": ("vqav2", "gqa"),
    "shape": ("gqa", "vqav2"),
    "count": ("vqav2", "gqa"),
    "relation": ("gqa", "vqav2"),
    "where": ("gqa", "vqav2"),
    "exist": ("pope",),
    "attribute": ("mme", "mme_original"),
    "compare": ("hallusionbench",),
    "unanswerable": ("vizwiz",),
    "choice": ("scienceqa", "seedbench", "mmbench_en", "mmbench_en_hint", "scienceqa_context"),
    "choice_zh": ("mmbench_cn", "mmbench_cn_short", "mmbench_cn_hint"),
    "read": ("textvqa",),
    "ocr": ("ocrbench",),
    "chart": ("chartqa",),
    "chart_extreme": ("chartqa",),
    "diagram": ("ai2d",),
    "describe": ("plain",),
}
"""Every question family with the formats it is asked in; the first is the most typical."""

LONG_FAMILY_BENCHMARKS: dict[str, tuple[str, ...]] = {"describe_places": ("plain",)}
"""Families with answers of many tokens: asked on request alone, as only one bundled model learned them."""

_SHORT = "\nAnswer the question using a single word or phrase."
_LETTER = "\nAnswer with the option's letter from the given choices directly."
_LETTER_ZH = "\n请直接使用所提供的选项字母作为答案回答。"
_FORMATS: dict[str, str] = {
    **dict.fromkeys(("vqav2", "gqa", "pope", "mme"), "{stem}" + _SHORT),
    **dict.fromkeys(("hallusionbench", "ocrbench", "plain"), "{stem}"),
    **dict.fromkeys(("scienceqa", "seedbench", "ai2d"), "{stem}\n{options}" + _LETTER),
    "textvqa": "{Stem}" + _SHORT,
    "mme_original": "{stem} Please answer yes or no.",
    "vizwiz": "{stem}\nWhen the provided information is insufficient, respond with 'Unanswerable'." + _SHORT,
    "chartqa": "{stem}\nAnswer the question with a single word.",
    "scienceqa_context": "Context: The picture shows several things.\n{stem}\n{options}" + _LETTER,
    "mmbench_en": "{stem} There are several options:\n{options}\n" + _LETTER,
    "mmbench_en_hint": "The picture shows several things. {stem} There are several options:\n{options}\n" + _LETTER,
    "mmbench_cn": "nan {stem} 有如下几个选项：\n{options}\n" + _LETTER_ZH,
    "mmbench_cn_hint": "请看图回答问题。 {stem} 有如下几个选项：\n{options}\n" + _LETTER_ZH,
    "mmbench_cn_short": "nan {stem} 有如下几个选项：\n{options}\n\n请直接回答选项字母。",
}

BENCHMARKS: tuple[str, ...] = tuple(dict.fromkeys(b for group in FAMILY_BENCHMARKS.values() for b in group))


def prompt(question: Question, benchmark: str) -> str:
    """The user's text for ``question`` in the format of ``benchmark``.

    Raises:
        ValueError: an unknown benchmark, or a multiple-choice format for an open question.
    """
    if benchmark not in BENCHMARKS:
        raise ValueError(f"benchmark must be one of {BENCHMARKS}, but got {benchmark!r}")
    stem, template = question.stem, _FORMATS[benchmark]
    if "{options}" in template and not question.options:
        raise ValueError(f"benchmark {benchmark!r} needs options, but the question {stem!r} has none")
    options = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", question.options, strict=False))
    return template.format(stem=stem, Stem=stem.capitalize(), options=options)
