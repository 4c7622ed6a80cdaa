"""Validation sets by name, in disjoint splits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from dop_search.data.jsonl import jsonl_samples
from dop_search.data.rendered import FAMILIES, rendered_samples
from dop_search.data.samples import Sample, ValidationSet
from dop_search.errors import DataError

Split = Literal["search", "heldout", "test"]
SPLITS: tuple[Split, ...] = ("search", "heldout", "test")
SOURCES = ("pocket", "jsonl")


def validation_set(
    name: str,
    num_samples: int = 100,
    seed: int = 0,
    split: Split = "search",
    path: str | Path | None = None,
    families: Sequence[str] | None = None,
) -> ValidationSet:
    """Samples of one split; the splits of one seed share no sample.

    Args:
        name: ``"pocket"`` (rendered by this project) or ``"jsonl"`` (a file, see ``dop_search.data.jsonl``).
        num_samples: how many.
        seed: of rendering, or of the shuffle of a file.
        split: ``"search"`` (curves and re-ranking), ``"heldout"`` (confirmation) or ``"test"`` (task accuracy).
        path: the file of ``"jsonl"``. Every third shuffled sample belongs to the same split.
        families: kinds of question to use; all by default.

    Raises:
        DataError: on an unknown source or family, a file that cannot be read, or too few samples.
    """
    if split not in SPLITS:
        raise DataError(f"`split` must be one of {list(SPLITS)}, but got {split!r}")
    if num_samples < 1:
        raise DataError(f"a validation set needs `num_samples >= 1`, but got (num_samples={num_samples})")
    if name == "pocket":
        unknown = sorted(set(families or ()) - set(FAMILIES))
        if unknown:
            raise DataError(f"the rendered data has no families {unknown}; it has {list(FAMILIES)}")
        return ValidationSet(name, split, seed, rendered_samples(split, num_samples, seed, families))
    if name == "jsonl":
        if path is None:
            raise DataError("a jsonl validation set needs `path`; set data.path=FILE.jsonl")
        return ValidationSet(name, split, seed, _split_file(path, num_samples, seed, split, families))
    raise DataError(f"unknown validation set {name!r}; there are {', '.join(SOURCES)}")


def _split_file(
    path: str | Path, num_samples: int, seed: int, split: Split, families: Sequence[str] | None
) -> tuple[Sample, ...]:
    samples = [sample for sample in jsonl_samples(path) if families is None or sample.family in families]
    order = np.random.default_rng(seed).permutation(len(samples))
    part = [samples[index] for index in order[SPLITS.index(split) :: len(SPLITS)]]
    if len(part) < num_samples:
        raise DataError(
            f"{str(path)!r} has {len(samples)} usable samples, which makes {len(part)} for the {split} split, but "
            f"{num_samples} are asked for; add samples or lower data.num_samples, data.num_heldout and data.num_test"
        )
    return tuple(part[:num_samples])
