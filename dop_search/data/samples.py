"""Samples and validation sets: what every stage of a search reads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from PIL import Image

from dop_search.utils.errors import DataError

IMAGE_PLACE = "<image>"
"""In a question: where an image stands, in the order of the images; without it they stand in front."""

CONTEXT_START, CONTEXT_END = "<context>", "</context>"
"""In a question for a model that reads text alone: around the passage whose operations are skipped."""


@dataclass(frozen=True)
class Sample:
    """A question about an image, about several, or about a passage of text.

    Attributes:
        id: stable and unique, e.g. ``"pocket/search/0/000123"``.
        image: RGB image; ``None`` where the question is about a ``<context>`` in it.
        question: the user's text including the benchmark's format suffix, without the chat template; ``<image>`` in it
            says where an image stands.
        answers: accepted answers, the first is canonical; none if they are not known, which a search does not need.
        family: question family, e.g. ``"count"``.
        more_images: RGB images after the first.
        system: the system prompt; empty for none.

    Raises:
        ValueError: an image that is not RGB.
        DataError: if the question has a place for some of the images and not for others, or there is neither an image
            nor a context.
    """

    id: str
    image: Image.Image | None
    question: str
    answers: tuple[str, ...]
    family: str
    more_images: tuple[Image.Image, ...] = ()
    system: str = ""

    def __post_init__(self) -> None:
        for image in self.images:
            if image.mode != "RGB":
                raise ValueError(
                    f"sample images must be RGB, but {self.id!r} has mode {image.mode!r}; "
                    'convert it with image.convert("RGB")'
                )
        where = f"the sample {self.id!r}"
        check_places(self.question, len(self.images), where)
        if self.image is None:
            check_context(self.question, where)

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """All images, in order."""
        return (*(() if self.image is None else (self.image,)), *self.more_images)

    @property
    def content(self) -> bytes:
        """What samples of different splits must not share: the (first) image, or the passage."""
        if self.image is not None:
            return repr(self.image.size).encode() + self.image.tobytes()
        return context_of(self.question).encode()


@dataclass(frozen=True)
class ValidationSet:
    """A named, ordered, non-empty set of samples; ValueError without any, or if two have the same id."""

    name: str
    split: str
    seed: int
    samples: tuple[Sample, ...]

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError(
                f"validation set {self.name!r} (split {self.split!r}) is empty; ask for num_samples >= 1, "
                "and check that the split and the chosen families select something"
            )
        ids = [sample.id for sample in self.samples]
        if len(set(ids)) != len(ids):
            repeated = sorted({i for i in ids if ids.count(i) > 1})
            raise ValueError(f"sample ids must be unique in {self.name!r}, but these repeat: {repeated[:5]}")

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    @property
    def ids(self) -> tuple[str, ...]:
        """Sample ids, in order."""
        return tuple(sample.id for sample in self.samples)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the SHA-256 over name, split, ids, questions, answers, image bytes and system prompts."""
        digest = hashlib.sha256()
        for part in (self.name, self.split):
            _update(digest, part.encode())
        for sample in self.samples:
            for text in (sample.id, sample.question, *sample.answers):
                _update(digest, text.encode())
            for image in sample.images:
                _update(digest, repr(image.size).encode())
                _update(digest, image.tobytes())
            if sample.system:
                _update(digest, b"system")
                _update(digest, sample.system.encode())
        return digest.hexdigest()[:16]


def check_places(question: str, num_images: int, where: str) -> None:
    """Refuse, by DataError, a question with places for some of its images."""
    places = question.count(IMAGE_PLACE)
    if places not in (0, num_images):
        raise DataError(
            f"{where}: the question has {IMAGE_PLACE!r} {places} times, but {num_images} images; write it once per "
            "image, where that stands, or leave it out: the images come first then"
        )


def check_context(question: str, where: str) -> None:
    """Refuse, by DataError, a question without a context, or with one that does not end before the next begins."""
    parts = question.split(CONTEXT_START)
    ends = [part.count(CONTEXT_END) for part in parts]
    if len(parts) == 1 or ends[0] or any(count != 1 for count in ends[1:]):
        raise DataError(
            f"{where}: a question without an image needs a context, written {CONTEXT_START}…{CONTEXT_END}, and each "
            f"begins and ends once; the question has {len(parts) - 1} beginnings and {sum(ends)} ends"
        )


def with_context(passage: str, question: str) -> str:
    """A question about a passage, as models that read text alone are asked."""
    return f"{CONTEXT_START}\n{passage}\n{CONTEXT_END}\n{question}"


def context_of(question: str) -> str:
    """What stands in a question's (first) context; empty without one."""
    return question.partition(CONTEXT_START)[2].partition(CONTEXT_END)[0]


def without_places(question: str) -> str:
    """The question about one image without its ``<image>``: the image comes first, as in LLaVA's training."""
    return question.replace(IMAGE_PLACE, "").strip() if question.count(IMAGE_PLACE) == 1 else question


def alike_batches(samples: Sequence[Sample], batch_size: int) -> list[list[int]]:
    """Indices in batches of the same family and similar questions, whose answers end at about the same time."""
    order = sorted(range(len(samples)), key=lambda i: (samples[i].family, len(samples[i].question), i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def score_answer(prediction: str, sample: Sample) -> bool:
    """Whether ``prediction`` equals an accepted answer, but for case, spaces and final dots; DataError without any."""
    if not sample.answers:
        raise no_answer(f"the sample {sample.id!r}")
    return _normalized(prediction) in {_normalized(answer) for answer in sample.answers}


def no_answer(where: str) -> DataError:
    """The error of a sample without the answer that something needs."""
    return DataError(
        f"{where} has no answer, but accuracy and data.answers=ground_truth need one; add an `answer`, or do without: "
        "data.num_test=0 (a search without accuracy), data.answers=teacher"
    )


def _normalized(text: str) -> str:
    return text.strip().lower().rstrip(".").rstrip()


def _update(digest: hashlib._Hash, part: bytes) -> None:
    digest.update(len(part).to_bytes(8, "little"))  # length prefix: ("ab", "c") differs from ("a", "bc")
    digest.update(part)
