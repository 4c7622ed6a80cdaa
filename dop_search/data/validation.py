"""Validation sets by name, in disjoint splits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from dop_search.data.disjoint import draw
from dop_search.data.jsonl import jsonl_samples
from dop_search.data.named import known_names, named_sources
from dop_search.data.pools import open_pool
from dop_search.data.rendered import FAMILIES, LONG_FAMILIES, rendered_samples
from dop_search.data.samples import Sample, ValidationSet
from dop_search.data.sources import Source
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
    sources: Sequence[Source] | None = None,
) -> ValidationSet:
    """Samples of one split; the splits of one seed share no sample.

    Args:
        name: ``"pocket"`` (rendered by this project), ``"jsonl"`` (a file, see ``dop_search.data.jsonl``), a file in
            ``conf/data`` with ``sources`` (``"gqa"``, ``"textvqa"``, ``"mixed"``, …), or any name with ``sources``.
        num_samples: how many.
        seed: of rendering, or of the shuffle of a file.
        split: ``"search"`` (curves and re-ranking), ``"heldout"`` (confirmation) or ``"test"`` (task accuracy).
        path: the file of ``"jsonl"``. Every third shuffled sample belongs to the same split.
        families: kinds of question to use; all with short answers by default.
        sources: splits of benchmarks or data sets to draw from, see ``dop_search.data.sources``.

    Raises:
        DataError: on an unknown source or family, a file that cannot be read, or too few samples.
    """
    if split not in SPLITS:
        raise DataError(f"`split` must be one of {list(SPLITS)}, but got {split!r}")
    if num_samples < 1:
        raise DataError(f"a validation set needs `num_samples >= 1`, but got (num_samples={num_samples})")
    if sources:
        return ValidationSet(name, split, seed, _from_sources(sources, num_samples, seed, split, families))
    if name == "pocket":
        known = (*FAMILIES, *LONG_FAMILIES)
        unknown = sorted(set(families or ()) - set(known))
        if unknown:
            raise DataError(f"the rendered data has no families {unknown}; it has {list(known)}")
        return ValidationSet(name, split, seed, rendered_samples(split, num_samples, seed, families))
    if name == "jsonl":
        if path is None:
            raise DataError("a jsonl validation set needs `path`; set data.path=FILE.jsonl")
        return ValidationSet(name, split, seed, _split_file(path, num_samples, seed, split, families))
    sources = named_sources(name)
    if sources is None:
        raise DataError(f"unknown validation set {name!r}; there are {', '.join((*SOURCES, *known_names()))}")
    return ValidationSet(name, split, seed, _from_sources(sources, num_samples, seed, split, families))


def _from_sources(
    sources: Sequence[Source], num_samples: int, seed: int, split: Split, families: Sequence[str] | None
) -> tuple[Sample, ...]:
    labels = [source.label for source in sources]
    if len(set(labels)) < len(labels):
        raise DataError(f"each source needs a name of its own, since sample ids start with it, but got {labels}")
    pools = [(open_pool(source), source.weight) for source in sources]
    return draw(pools, num_samples, seed, SPLITS.index(split), len(SPLITS), families)


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
