"""GQA keeps its images in a data set of their own."""

from __future__ import annotations

from typing import Any

SOURCE = '''"""Generated: the images of GQA at the commit of its questions."""

from functools import partial

from dop_search.evaluation.lmms.gqa import with_images

with_images_at_revision = partial(with_images, revision={revision!r})
'''
"""A module beside the generated task file, since a task file passes no arguments to its functions."""


def with_images(questions: Any, revision: str | None = None) -> Any:
    """Questions with their image beside them, nothing copied.

    lmms-eval's own function decodes every image, asks for a login, and reads the newest images whatever the questions'
    revision.
    """
    import datasets

    path = "lmms-lab-encoder/GQA"
    images = datasets.load_dataset(path, "testdev_balanced_images", split="testdev", revision=revision)
    row_of = {name: row for row, name in enumerate(images["id"])}
    aligned = images.select([row_of[name] for name in questions["imageId"]]).select_columns(["image"])
    return datasets.concatenate_datasets([questions, aligned], axis=1)
