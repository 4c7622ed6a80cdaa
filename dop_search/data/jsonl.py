"""Samples of the user's own: one JSON object a line with an image path, a question and, if it is known, its answer."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from dop_search.data.samples import Sample
from dop_search.utils.errors import DataError


@dataclass(frozen=True)
class JsonlRow:
    """A line whose image has been found but not decoded.

    Attributes:
        where: file and line, as errors name them.
        id, question, answers, family: as in :class:`Sample`.
        image: path of the image.
    """

    where: str
    id: str
    image: Path
    question: str
    answers: tuple[str, ...]
    family: str

    def sample(self) -> Sample:
        """The line with its image.

        Raises:
            DataError: if the image cannot be decoded.
        """
        try:
            with Image.open(self.image) as image:
                decoded = image.convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise _unreadable(self.image, self.where, error) from error
        return Sample(self.id, decoded, self.question, self.answers, self.family)


def read_jsonl(path: str | Path) -> tuple[JsonlRow, ...]:
    """Read ``{"image": …, "question": …, "answer": … | [...]?, "id": …?, "family": …?}`` lines.

    Image paths are relative to the file. An ``answer`` that is missing, ``null`` or blank is not known. Ids default to
    the line number, the family to ``"all"``.

    Raises:
        DataError: naming the file, the line and what is wrong with it.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"no validation file at {str(path)!r}; give data.path=FILE.jsonl")
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would also cut at breaks inside a text
    except UnicodeDecodeError as error:
        raise DataError(f"{str(path)!r} is not UTF-8 text ({error}); save it as UTF-8") from error
    rows = [_row(file, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
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


def image_contents(rows: tuple[JsonlRow, ...]) -> dict[Path, str]:
    """A hash of each image file's bytes: copies of an image under several names are the same image."""
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in {row.image for row in rows}}


def _row(file: Path, number: int, line: str) -> JsonlRow:
    where = f"{str(file)!r} line {number}"
    try:
        item: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}") from error
    if not isinstance(item, dict):
        raise DataError(f"{where} must be an object, but got {item!r}")
    missing = [name for name in ("image", "question") if item.get(name) in (None, "")]
    if missing:
        raise DataError(f"{where} lacks {missing}; it has {sorted(item)}")
    image = item["image"]
    if not isinstance(image, str):
        raise DataError(f"{where}: `image` must be the path of one image, but got {image!r}; a sample has one image")
    return JsonlRow(
        where=where,
        id=str(_or(item.get("id"), f"{file.stem}/{number:06d}")),
        image=_found(file.parent / image, where),
        question=str(item["question"]),
        answers=_answers(item.get("answer"), where),
        family=str(_or(item.get("family"), "all")),
    )


def _answers(value: Any, where: str) -> tuple[str, ...]:
    given = value if isinstance(value, list) else [value]
    for answer in given:
        if not isinstance(answer, (str, int, float, type(None))):
            raise DataError(f"{where}: `answer` must be a text, a number or a list of these, but got {value!r}")
    return tuple(str(answer) for answer in given if answer is not None and str(answer).strip())


def _or(value: Any, default: str) -> Any:
    return default if value is None else value


def _found(path: Path, where: str) -> Path:
    try:
        with Image.open(path):  # reads no more than the header
            return path
    except (OSError, UnidentifiedImageError) as error:
        raise _unreadable(path, where, error) from error


def _unreadable(path: Path, where: str, error: OSError) -> DataError:
    return DataError(f"{where}: cannot read the image {str(path)!r} ({error}); fix or drop the line")
