"""How the benchmarks of the field phrase a question, so that one question can be asked in each one's format."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BENCHMARKS", "FAMILY_BENCHMARKS", "LONG_FAMILY_BENCHMARKS", "Mention", "Question", "prompt"]

_SHORT = "\nAnswer the question using a single word or phrase."
_LETTER = "\nAnswer with the option's letter from the given choices directly."
_UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
_YES_NO = " Please answer yes or no."
_ONE_WORD = "\nAnswer the question with a single word."
_LETTER_ZH = "\n请直接使用所提供的选项字母作为答案回答。"
_LETTER_ZH_SHORT = "\n请直接回答选项字母。"
_OPTIONS_HEADER = "There are several options:"
_OPTIONS_HEADER_ZH = "有如下几个选项："
_HINT = "The picture shows several things."
_HINT_ZH = "请看图回答问题。"


@dataclass(frozen=True)
class Mention:
    """Where a question's stem names items: the noun ends before character ``end``; ``items`` are their indices."""

    end: int
    items: tuple[int, ...]


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

BENCHMARKS: tuple[str, ...] = tuple(dict.fromkeys(b for group in FAMILY_BENCHMARKS.values() for b in group))


def prompt(question: Question, benchmark: str) -> str:
    """The user's text for ``question`` in the format of ``benchmark``.

    Raises:
        ValueError: an unknown benchmark, or a multiple-choice format for an open question.
    """
    if benchmark not in BENCHMARKS:
        raise ValueError(f"benchmark must be one of {BENCHMARKS}, but got {benchmark!r}")
    stem = question.stem
    if benchmark in ("vqav2", "gqa", "pope", "mme"):
        return stem + _SHORT
    if benchmark == "textvqa":
        return stem.capitalize() + _SHORT
    if benchmark == "mme_original":
        return stem + _YES_NO
    if benchmark in ("hallusionbench", "ocrbench", "plain"):
        return stem
    if benchmark == "vizwiz":
        return stem + _UNANSWERABLE + _SHORT
    if benchmark == "chartqa":
        return stem + _ONE_WORD
    if not question.options:
        raise ValueError(f"benchmark {benchmark!r} needs options, but the question {stem!r} has none")
    options = "\n".join(f"{chr(ord('A') + i)}. {text}" for i, text in enumerate(question.options))
    if benchmark in ("scienceqa", "seedbench", "ai2d"):
        return f"{stem}\n{options}{_LETTER}"
    if benchmark == "scienceqa_context":
        return f"Context: {_HINT}\n{stem}\n{options}{_LETTER}"
    if benchmark == "mmbench_en":
        return f"{stem} {_OPTIONS_HEADER}\n{options}\n{_LETTER}"
    if benchmark == "mmbench_en_hint":
        return f"{_HINT} {stem} {_OPTIONS_HEADER}\n{options}\n{_LETTER}"
    if benchmark == "mmbench_cn_hint":
        return f"{_HINT_ZH} {stem} {_OPTIONS_HEADER_ZH}\n{options}\n{_LETTER_ZH}"
    suffix = _LETTER_ZH if benchmark == "mmbench_cn" else _LETTER_ZH_SHORT
    return f"nan {stem} {_OPTIONS_HEADER_ZH}\n{options}\n{suffix}"
