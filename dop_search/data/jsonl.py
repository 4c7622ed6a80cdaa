"""Samples of the user's own: one JSON object a line with an image path, a question and its answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from dop_search.data.samples import Sample
from dop_search.errors import DataError


def jsonl_samples(path: str | Path) -> tuple[Sample, ...]:
    """Read ``{"image": …, "question": …, "answer": … | [...], "id": …?, "family": …?}`` lines.

    Image paths are relative to the file. Ids default to the line number, the family to ``"all"``.

    Raises:
        DataError: naming the file, the line and what is wrong with it.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"no validation file at {str(path)!r}; give data.path=FILE.jsonl")
    samples = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            samples.append(_sample(file, number, line))
    if not samples:
        raise DataError(f"{str(path)!r} has no samples; each line needs image, question and answer")
    return tuple(samples)


def _sample(file: Path, number: int, line: str) -> Sample:
    where = f"{str(file)!r} line {number}"
    try:
        item: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}") from error
    if not isinstance(item, dict):
        raise DataError(f"{where} must be an object, but got {item!r}")
    missing = [name for name in ("image", "question", "answer") if not item.get(name)]
    if missing:
        raise DataError(f"{where} lacks {missing}; it has {sorted(item)}")
    answer = item["answer"]
    answers = tuple(str(text) for text in answer) if isinstance(answer, list) else (str(answer),)
    return Sample(
        id=str(item.get("id", f"{file.stem}/{number:06d}")),
        image=_read_image(file.parent / item["image"], where),
        question=str(item["question"]),
        answers=answers,
        family=str(item.get("family", "all")),
    )


def _read_image(path: Path, where: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{where}: cannot read the image {str(path)!r} ({error}); mend or drop the line") from error
