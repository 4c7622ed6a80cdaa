"""Samples of the user's own: a JSON object a line, or a file of conversations as LLaVA's and ShareGPT's."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from dop_search.data.images import check_image, read_image
from dop_search.data.samples import Sample, check_context, check_places, with_context, without_places
from dop_search.utils.errors import DataError

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_SPELLINGS = {"conversations": ("from", "value"), "messages": ("role", "content")}
"""Key of a conversation → the keys of its turns."""
_KEYS = ("image", "images", "context", "question", "answer", "system", "id", "family", *_SPELLINGS)


@dataclass(frozen=True)
class JsonlRow:
    """A line whose images have been found but not decoded.

    Attributes:
        where: file and line, as errors name them.
        id, question, answers, family, system: as in :class:`Sample`.
        images: paths of the images; none where the question has a ``<context>``.
    """

    where: str
    id: str
    images: tuple[Path, ...]
    question: str
    answers: tuple[str, ...]
    family: str
    system: str = ""

    def sample(self) -> Sample:
        """The line with its images; DataError if one cannot be decoded."""
        images = [read_image(path, self.where) for path in self.images]
        first, others = (images[0], tuple(images[1:])) if images else (None, ())
        return Sample(self.id, first, self.question, self.answers, self.family, others, self.system)


def read_jsonl(path: str | Path) -> tuple[JsonlRow, ...]:
    """Read ``{"image": …, "question": …, "answer": … | [...]?, "system": …?, "id": …?, "family": …?}`` lines.

    For models that read text alone ``context``, a passage of text, takes the place of ``image``.

    ``image`` is a path relative to the file, or a list of paths. With one image a ``<image>`` in the question is left
    out, and the image comes first, as in LLaVA's training; of several images each may have its ``<image>`` in the
    question, and they come first if none has. An ``answer`` that is missing, ``null`` or blank is not known. ``system``
    is the system prompt. Ids default to the line number, the family to ``"all"``. Other keys are left alone, unless
    they are nearly one of these that is missing.

    Instead of question, answer and system a line may have ``conversations`` (turns with ``from`` and ``value``, as in
    LLaVA's files) or ``messages`` (``role`` and ``content``): the first question with its answer is taken. A file may
    be one JSON list of such objects.

    Raises:
        DataError: naming the file, the line and what is wrong with it.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"no validation file at {str(path)!r}; give data.path=FILE.jsonl")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{str(path)!r} is not UTF-8 text ({error}); save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r}: {error.strerror}") from error
    if text.lstrip().startswith("["):
        items = _parsed(text, repr(str(file)))
        rows = [_row(file, number, f"{str(file)!r} item {number}", item) for number, item in enumerate(items, start=1)]
    else:
        lines = text.split("\n")  # splitlines() would also cut at breaks inside a text
        places = [(n, f"{str(file)!r} line {n}", line) for n, line in enumerate(lines, start=1) if line.strip()]
        rows = [_row(file, number, where, _parsed(line, where)) for number, where, line in places]
    if not rows:
        raise DataError(f"{str(path)!r} has no samples; each line needs image and question")
    first: dict[str, JsonlRow] = {}
    for row in rows:
        if row.id in first:
            raise DataError(
                f"{row.where} has the id {row.id!r} of {first[row.id].where}; make ids unique, or leave them out"
            )
        first[row.id] = row
    return tuple(rows)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}") from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not allowed")


def _row(file: Path, number: int, where: str, item: Any) -> JsonlRow:
    if not isinstance(item, dict):
        raise DataError(f"{where} must be an object, but got {item!r}")
    fields = {**item, **_exchange(item, where)}
    if "images" in fields:
        if "image" in fields:
            raise DataError(f"{where} has both `image` and `images`; leave one out")
        fields["image"] = fields["images"]
    _check_spelling(fields, where)
    about = "context" if "context" in fields and "image" not in fields else "image"
    missing = [name for name in (about, "question") if fields.get(name) in (None, "", [])]
    if missing:
        raise DataError(f"{where} lacks {missing}; it has {sorted(item)}")
    question = _text(fields["question"], "question", where)
    images: tuple[Path, ...] = ()
    if about == "image":
        images = _images(file, fields["image"], where)
    else:
        question = with_context(_text(fields["context"], "context", where), question)
        check_context(question, where)
    if len(images) == 1:
        question = without_places(question)
    check_places(question, len(images), where)
    if not question.strip():
        raise DataError(f"{where}: the question is blank")
    return JsonlRow(
        where=where,
        id=_name(fields.get("id"), "id", f"{file.stem}/{number:06d}", where),
        images=images,
        question=question,
        answers=_answers(fields.get("answer"), where),
        family=_name(fields.get("family"), "family", "all", where),
        system="" if fields.get("system") is None else _text(fields["system"], "system", where),
    )


def _check_spelling(fields: Mapping[str, Any], where: str) -> None:
    """Refuse keys that are nearly one that the line lacks: their values would be left out without a word."""
    wanted = set(_KEYS) - {"id", *fields} - (set(_SPELLINGS) if "question" in fields else set())
    if "image" in fields:
        wanted -= {"images", "context"}
    for key in set(fields) - set(_KEYS):
        plain = key.strip().casefold()
        near = [name for name in get_close_matches(plain, wanted, cutoff=0.8) if abs(len(name) - len(plain)) <= 1]
        if near:
            raise DataError(f"{where}: did you mean `{near[0]}` by {key!r}? Rename it, or leave it out")


def _exchange(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Question, answer and system prompt of a conversation; nothing if the line has none."""
    key = next((key for key in _SPELLINGS if key in item), None)
    if key is None:
        return {}
    for other in ("question", *_SPELLINGS):
        if other != key and other in item:
            raise DataError(f"{where} has both `{other}` and `{key}`; leave one out")
    said, text = _SPELLINGS[key]
    turns = item[key]
    fields: dict[str, Any] = {}
    if not isinstance(turns, list) or not all(isinstance(turn, dict) and {said, text} <= {*turn} for turn in turns):
        raise DataError(f"{where}: `{key}` must list turns with `{said}` and `{text}`, but got {_short(turns)}")
    for turn in turns:
        role = _ROLES.get(turn[said]) if isinstance(turn[said], str) else None
        if role is None:
            raise DataError(f"{where}: `{said}` of a turn must be one of {list(_ROLES)}, but got {turn[said]!r}")
        value = _text(turn[text], text, where)
        if role == "user" and "question" not in fields:
            fields["question"] = value
        elif role == "assistant" and "question" in fields:
            fields["answer"] = value
            break
        elif role == "system" and not fields:
            fields["system"] = value
        else:
            raise DataError(f"{where}: `{key}` must begin with a question, and may have one system prompt before it")
    for name in fields:
        if item.get(name) is not None:
            raise DataError(f"{where} has `{name}` both in `{key}` and beside it; leave one out")
    return fields


def _images(file: Path, value: Any, where: str) -> tuple[Path, ...]:
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and name for name in names):
        raise DataError(f"{where}: `image` must be the path of an image, or a list of paths, but got {_short(value)}")
    paths = tuple(file.parent / _text(name, "image", where) for name in names)
    for path in paths:
        check_image(path, where)
    return paths


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: `{name}` must be a text, but got {_short(value)}")
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{where}: `{name}` holds a NUL or half of a surrogate pair, which is no text: {_short(value)}")
    return value


def _name(value: Any, name: str, default: str, where: str) -> str:
    if value is None:
        return default
    is_number = isinstance(value, int) and not isinstance(value, bool)
    text = _text(str(value) if is_number else value, name, where)
    if not text.strip():
        raise DataError(f"{where}: `{name}` is blank; leave it out for {default!r}")
    return text


def _answers(value: Any, where: str) -> tuple[str, ...]:
    given = value if isinstance(value, list) else [value]
    for answer in given:
        plain = isinstance(answer, (str, int, float, type(None))) and not isinstance(answer, bool)
        if not plain or (isinstance(answer, float) and not math.isfinite(answer)):
            raise DataError(f"{where}: `answer` must be a text, a number or a list of these, but got {_short(value)}")
    texts = [_text(str(answer), "answer", where) for answer in given if answer is not None]
    return tuple(text for text in texts if text.strip())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
