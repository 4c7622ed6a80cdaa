"""Validation sets by name, in disjoint splits."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from dop_search.data.disjoint import draw, joined
from dop_search.data.jsonl import JsonlRow, read_jsonl
from dop_search.data.passages import passage_samples
from dop_search.data.pools import open_pool
from dop_search.data.rendered import FAMILIES, LONG_FAMILIES, rendered_samples
from dop_search.data.samples import Sample, ValidationSet, context_of
from dop_search.data.sources import Source, known_names, named_sources
from dop_search.utils.errors import DataError

Split = Literal["search", "heldout", "test", "decision"]
"""``decision``: further samples of the draw of the search set, which decide among the last few strategies."""
SPLITS: tuple[Split, ...] = ("search", "heldout", "test")
SIZE_KEYS: Mapping[Split, str] = {
    "search": "data.num_samples (or data.num_decision, which are drawn with them)",
    "heldout": "data.num_heldout",
    "test": "data.num_test",
}
OWN = ("pocket", "passages", "jsonl")
"""Data that need neither a hub nor a data set."""


def validation_set(
    name: str,
    num_samples: int = 100,
    seed: int = 0,
    split: Split = "search",
    path: str | Path | None = None,
    families: Sequence[str] | None = None,
    sources: Sequence[Source] | None = None,
) -> ValidationSet:
    """Samples of one split; the splits of one seed share no sample.

    Args:
        name: ``"pocket"`` (rendered by this project), ``"passages"`` (text, for models without images), ``"jsonl"`` (a
            file, see ``dop_search.data.jsonl``), a file in ``conf/data`` with ``sources`` (``"gqa"``, ``"textvqa"``,
            ``"mixed"``, …), or any name with ``sources``.
        seed: of rendering, or of the shuffle of a file.
        split: ``"search"`` (curves and re-ranking), ``"heldout"`` (confirmation) or ``"test"`` (task accuracy).
        path: the file of ``"jsonl"``, see :func:`file_rows`.
        families: kinds of question to use; all with short answers by default.
        sources: splits of benchmarks or data sets to draw from, see ``dop_search.data.sources``.

    Raises:
        DataError: on an unknown source or family, a file that cannot be read, or too few samples.
    """
    if split == "decision" or split not in SPLITS:
        raise DataError(f"`split` must be one of {list(SPLITS)}, but got {split!r}")
    if num_samples < 1:
        raise DataError(f"a validation set needs `num_samples >= 1`, but got (num_samples={num_samples})")
    drawn_from = sources_of(name, sources)
    if drawn_from:
        return ValidationSet(name, split, seed, _from_sources(drawn_from, num_samples, seed, split, families))
    if name == "pocket":
        known = (*FAMILIES, *LONG_FAMILIES)
        unknown = sorted(set(families or ()) - set(known))
        if unknown:
            raise DataError(f"the rendered data has no families {unknown}; it has {list(known)}")
        return ValidationSet(name, split, seed, rendered_samples(split, num_samples, seed, families))
    if name == "passages":
        return ValidationSet(name, split, seed, passage_samples(SPLITS.index(split), num_samples, seed, families))
    if path is None:
        raise DataError("a jsonl validation set needs `path`; set data.path=FILE.jsonl")
    rows = file_rows(path, {split: num_samples}, seed, families)[split]
    return ValidationSet(name, split, seed, tuple(row.sample() for row in rows))


def sources_of(name: str, sources: Sequence[Source] | None = None) -> tuple[Source, ...]:
    """The splits that samples are drawn from, none for rendered samples and files; DataError on an unknown name."""
    if sources or name in OWN:
        return tuple(sources or ())
    known = named_sources(name)
    if known is None:
        raise DataError(f"unknown validation set {name!r}; there are {', '.join((*OWN, *known_names()))}")
    return known


def file_rows(
    path: str | Path, sizes: Mapping[Split, int], seed: int = 0, families: Sequence[str] | None = None
) -> dict[Split, tuple[JsonlRow, ...]]:
    """The lines of a JSONL file that each split uses.

    The lines are shuffled. The images, in the order in which they first come, belong to search, held-out and test set
    in turn, with all their questions and the images beside them there, whatever ``families`` are asked for: no two
    splits of one seed share an image. Each split uses the first of its lines, as many as ``sizes`` says.

    Raises:
        DataError: on a line that cannot be used, or too few of them; says how many are needed.
    """
    rows = read_jsonl(path)
    paths = {path for row in rows for path in row.images}  # copies under several names are the same image
    contents = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    split_of: dict[str, Split] = {}
    parts: dict[Split, list[JsonlRow]] = {split: [] for split in SPLITS}
    groups = joined([[contents[path] for path in row.images] or [context_of(row.question)] for row in rows])
    for index in np.random.default_rng(seed).permutation(len(rows)):
        row = rows[index]
        split = split_of.setdefault(groups[index], SPLITS[len(split_of) % len(SPLITS)])
        if families is None or row.family in families:
            parts[split].append(row)
    short = [split for split, size in sizes.items() if len(parts[split]) < size]
    if short:
        usable = sum(len(part) for part in parts.values())
        counts = ", ".join(f"{split} {len(parts[split])} of {size}" for split, size in sizes.items())
        needed = max(len(SPLITS) * (size - 1) + SPLITS.index(split) + 1 for split, size in sizes.items() if size)
        only = "" if families is None else f" of the families {list(families)}"
        raise DataError(
            f"{str(path)!r} has {usable} usable samples{only} and {len(split_of)} different images; every third image "
            f"belongs to the same of the splits {', '.join(SPLITS)}, which makes {counts} that are asked for. That "
            f"takes {needed} lines with an image each: add lines, or lower "
            f"{' and '.join(SIZE_KEYS[split] for split in short)}"
        )
    return {split: tuple(parts[split][:size]) for split, size in sizes.items()}


def _from_sources(
    sources: Sequence[Source], num_samples: int, seed: int, split: Split, families: Sequence[str] | None
) -> tuple[Sample, ...]:
    labels = [source.label for source in sources]
    if len(set(labels)) < len(labels):
        raise DataError(f"each source needs a name of its own, since sample ids start with it, but got {labels}")
    pools = [(open_pool(source), source.weight) for source in sources]
    return draw(pools, num_samples, seed, SPLITS.index(split), len(SPLITS), families)
